"""HardSwish written out becomes the operator, in all forms that exporters write, and nothing else does."""

from collections import Counter

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.protos import default_opset
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization import fuse_hard_swish
from rdoq_onnx.passes.normalization.fuse_hard_swish import FuseHardSwish

NUMBERS = {"zero": 0, "three": 3, "six": 6, "sixth": 1 / 6, "five": 5, "half": 0.5}
CLIP = "a = Add (x, three) c = Clip (a, zero, six)"
GATE = "c = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x)"
FORMS = {
    "HardSigmoid": f"{GATE} y = Mul (x, c)",
    "HardSigmoid first": f"{GATE} y = Mul (c, x)",
    "Clip, Mul, Div": f"{CLIP} m = Mul (x, c) y = Div (m, six)",
    "Clip, Mul, Mul": f"{CLIP} m = Mul (c, x) y = Mul (sixth, m)",
    "Clip, Div, Mul": f"{CLIP} d = Div (c, six) y = Mul (x, d)",
    "number first": "a = Add (three, x) c = Clip (a, zero, six) m = Mul (x, c) y = Div (m, six)",
}
OTHERS = {
    "another slope": "c = HardSigmoid <alpha = 0.2, beta = 0.5> (x) y = Mul (x, c)",
    "default slope": "c = HardSigmoid (x) y = Mul (x, c)",
    "another tensor": f"{GATE} s = Sin (x) y = Mul (s, c)",
    "another ceiling": "a = Add (x, three) c = Clip (a, zero, five) m = Mul (x, c) y = Div (m, six)",
    "another offset": "a = Add (x, half) c = Clip (a, zero, six) m = Mul (x, c) y = Div (m, six)",
    "no ceiling": "a = Add (x, three) c = Clip (a, zero) m = Mul (x, c) y = Div (m, six)",
    "another factor": f"{CLIP} m = Mul (x, c) y = Div (m, five)",
    "divided": f"{CLIP} m = Mul (x, c) y = Div (six, m)",
    "a rank more": f"{CLIP} m = Mul (x, c) y = Div (m, deep)",
}


def parse(nodes, opset=14):
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[N, 4] x) => (float y) {{ {nodes} }}'
    )
    values = {**NUMBERS, "deep": np.full((1, 1, 1), 6)}
    values = {
        n: np.asarray(v, np.float32) for n, v in values.items() if any(n in node.input for node in model.graph.node)
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    return model


def ops(model):
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_one_operator(form, opset, ort_run):
    model = parse(FORMS[form], opset)
    fused = run_passes([FuseHardSwish()], model)
    assert ops(fused) == ["HardSwish"]
    assert default_opset(fused) == max(opset, 14)
    feeds = {"x": np.linspace(-7, 7, 40, dtype=np.float32).reshape(10, 4)}
    np.testing.assert_allclose(ort_run(fused, feeds)[0], ort_run(model, feeds)[0], atol=1e-6)


@pytest.mark.parametrize("form", OTHERS)
def test_other_products_stay(form):
    model = parse(OTHERS[form])
    assert run_passes([FuseHardSwish()], model) is model


def test_a_number_behind_it_stays():
    fused = run_passes([FuseHardSwish()], parse(f"{GATE} m = Mul (x, c) y = Mul (m, half)"))
    assert ops(fused) == ["HardSwish", "Mul"]


def test_what_else_reads_the_gate_keeps_it():
    fused = run_passes([FuseHardSwish()], parse(f"{GATE} m = Mul (x, c) y = Sub (m, c)"))
    assert Counter(ops(fused)) == {"HardSigmoid": 1, "HardSwish": 1, "Sub": 1}


def test_a_model_that_cannot_be_raised_stays(monkeypatch):
    def refuse(model, opset):
        raise ModelError(f"opset 13 could not be raised to {opset}")

    monkeypatch.setattr(fuse_hard_swish, "raise_opset", refuse)
    model = parse(FORMS["HardSigmoid"], 13)
    assert run_passes([FuseHardSwish()], model) is model
