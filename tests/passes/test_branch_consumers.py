"""Branches of a tensor: the listed consumers read the branch, no value changes, and branches can be joined again."""

import numpy as np
from onnx import checker, parser

from rdoq_onnx.model import surgeon
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.branch_consumers import BranchConsumers, join_branches
from tests.analysis.test_analyse import parse
from tests.analysis.test_float_consumers import POST_NORM, POST_NORM_WEIGHTS
from tests.passes.test_insert_qdq import count


def test_branch_changes_no_value(ort_run):
    model = parse(POST_NORM, **POST_NORM_WEIGHTS)

    def consumers(tensor):
        return [n.name for n in model.graph.node if tensor in n.input]

    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, 8), np.float32)}
    changed = run_passes([BranchConsumers({"n": consumers("n")[:1], "x": consumers("x")})], model)
    checker.check_model(changed, full_check=True)
    assert count(changed)["Identity"] == 2
    np.testing.assert_array_equal(ort_run(changed, feeds)[0], ort_run(model, feeds)[0])


def test_an_identity_of_another_domain_is_not_a_branch():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "other": 1]>
        g (float[2] x) => (float[2] y) { a = Sin (x) b = other.Identity (a) c = Identity (b) y = Tanh (c) }""")
    joined = surgeon.edit(model, join_branches)
    assert [(n.domain, n.op_type) for n in joined.graph.node] == [("", "Sin"), ("other", "Identity"), ("", "Tanh")]
