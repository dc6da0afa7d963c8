"""Whatever has weights and is not quantized is listed, with its reason."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ModelError
from rdoq_onnx.passes import run_passes
from rdoq_onnx.pipeline import NORMALIZE
from tests.conftest import ZOO

CASES = {
    "embedding tables stay in float": "e = Gather (table, i) s = ReduceSum (e)",
    "weights of recurrent cells stay in float": "u = Unsqueeze (x, zero) h, s = RNN <hidden_size = 8> (u, rw, rr)",
    "its weight comes from a DequantizeLinear": "d = DequantizeLinear (q, scale) s = MatMul (x, d)",
    "in the body of If 'branch', and only the main graph": """[branch] s = If (c) <
        then_branch = g1 () => (float[N, 4] t) { [inner] t = MatMul (x, w) },
        else_branch = g2 () => (float[N, 4] e) { e = Relu (x) }>""",
}
WEIGHTS = {
    "table": np.ones((300, 4), np.float32), "rw": np.ones((1, 8, 4), np.float32), "rr": np.ones((1, 8, 8), np.float32),
    "zero": np.zeros(1, np.int64), "scale": np.array(0.1, np.float32), "q": np.ones((4, 4), np.int8),
    "w": np.ones((4, 4), np.float32),
}  # fmt: skip


def model(nodes: str) -> onnx.ModelProto:
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x, int64[N, 3] i, bool c) => (float[N, 4] y) {{ {nodes} z = MatMul (x, w) y = Add (z, s) }}"""
    parsed = parser.parse_model(text)
    parsed.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in WEIGHTS.items() if k in text)
    return parsed


@pytest.mark.parametrize("reason", CASES)
def test_reason(reason: str) -> None:
    network = analyse(run_passes(NORMALIZE, model(CASES[reason])), Config())
    assert [layer.weight for layer in network.layers] == ["w"]
    (skip,) = network.skipped
    assert skip.node
    assert reason in skip.reason


@pytest.mark.skipif(not ZOO.exists(), reason="the zoo is not there")
def test_a_model_all_in_branches_is_refused_with_reasons() -> None:
    silero = run_passes(NORMALIZE, onnx.load(ZOO / "silero_vad" / "model.onnx"))
    with pytest.raises(ModelError, match=r"Conv .*: it is in the body of If 'If_0'"):
        analyse(silero, Config())
