"""Integers that a table and a layer have in common are stored once, and the numbers stay."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.share_ties import ShareTies
from tests.conftest import OrtRun

HEADS = {
    "MatMul": ("w_Mul = Mul (c, w_scale) y = MatMul (e, w_Mul)", (1, 0), (40,)),
    "Gemm": ("w_Mul = Mul (c, w_scale) y = Gemm <transB = 1> (e, w_Mul)", (0, 1), (40, 1)),
}


def model(head: str, integers: NDArray[np.int8], changed: bool = False) -> ModelProto:
    """A table of 40 rows, looked up by i [N], in front of a head with the same rows."""
    nodes, order, shape = HEADS[head]
    proto = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> g (int64[N] i) => (float[N, 40] y) {{
        r = Gather (table_quantized, i) f = Cast <to = 1> (r) s = Gather (table_scale, i) e = Mul (f, s)
        c = Cast <to = 1> (w_quantized) {nodes} }}""")
    scales = np.linspace(0.5, 1.5, 40, dtype=np.float32)
    weight = integers.transpose(order).copy()
    weight.reshape(-1)[0] += changed
    tensors = {
        "table_quantized": integers,
        "w_quantized": weight,
        "table_scale": scales[:, None],
        "w_scale": scales.reshape(shape),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in tensors.items())
    return proto


@pytest.mark.parametrize("head", HEADS)
def test_equal_rows_are_stored_once(head: str, ort_run: OrtRun) -> None:
    integers = np.random.default_rng(0).integers(-8, 8, (40, 16), np.int8)
    before = model(head, integers)
    after = run_passes([ShareTies([("table", "w")])], before)
    kept = [t for t in after.graph.initializer if t.dims and np.prod(t.dims) > 8]
    assert sorted(np.prod(t.dims) for t in kept) == [40, 640]
    outputs = [ort_run(m, {"i": np.arange(40)})[0] for m in (before, after)]
    assert all((one == other).all() for one, other in pairwise(outputs))


def test_different_rows_stay_apart() -> None:
    before = model("MatMul", np.ones((40, 16), np.int8), changed=True)
    after = run_passes([ShareTies([("table", "w")])], before)
    assert len([t for t in after.graph.initializer if np.prod(t.dims) == 640]) == 2


def test_without_ties_nothing_changes() -> None:
    before = model("MatMul", np.ones((40, 16), np.int8))
    assert run_passes([ShareTies([("other", "w")])], before).graph.node[0].op_type == "Gather"
    assert len(run_passes([ShareTies([])], before).graph.initializer) == 4
