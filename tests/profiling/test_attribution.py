"""Times of fused nodes go to the layers that they compute, conversions to the layer behind them; nothing is lost."""

import numpy as np
import onnx
import pytest
from onnx import parser

from rdoq_onnx.profiling.attribution import times_by_node
from rdoq_onnx.system.runtime import Runtime
from tests.conftest import ROOT

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4, 4, 4] x) => (float[1, 4, 4, 4] y)
<float[4, 4, 1, 1] w1, float[4, 4, 1, 1] w2, float[4, 4, 1, 1] w3>
{ [a] z1 = Conv (x, w1) r1 = Relu (z1) [b] z2 = Conv (r1, w2) s = Add (z2, x) [c] z3 = Conv (s, w3)
  y = Sigmoid (z3) }"""
# As ONNX Runtime fuses: names of tensors in its blocked layout, the sum inside the second convolution.
OPTIMIZED = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
g (float[1, 4, 4, 4] x) => (float[1, 4, 4, 4] y)
<float[4, 4, 1, 1] w1, float[4, 4, 1, 1] w2, float[4, 4, 1, 1] w3>
{ [into] x0 = com.microsoft.ReorderInput (x) [r1_nchwc] h1 = com.microsoft.Conv (x0, w1)
  [s_nchwc] h2 = com.microsoft.Conv (h1, w2, x0) [out] s = com.microsoft.ReorderOutput (h2)
  [q] s8 = DynamicQuantizeLinear (s) [c_token_7] z3 = Conv (s8, w3) [last] y = Sigmoid (z3) }"""
SECONDS = {"into": 1.0, "r1_nchwc": 10.0, "s_nchwc": 20.0, "out": 2.0, "q": 3.0, "c_token_7": 30.0, "last": 4.0}


def test_fused_nodes_and_what_serves_them():
    model, optimized = parser.parse_model(MODEL), parser.parse_model(OPTIMIZED)
    runs = {name: [9 * value, value, 9 * value, value] for name, value in SECONDS.items()}
    assert times_by_node(model, optimized, runs, ["a", "b", "c"]) == {"a": 11.0, "b": 22.0, "c": 37.0}


def test_nodes_that_nothing_connects_are_spread():
    optimized = parser.parse_model(OPTIMIZED)
    optimized.graph.node.append(onnx.helper.make_node("Shape", ["lone"], ["shape"], "lone"))
    runs = {name: [value] for name, value in (SECONDS | {"lone": 7.0}).items()}
    found = times_by_node(parser.parse_model(MODEL), optimized, runs, ["a", "b", "c"])
    assert sum(found.values()) == pytest.approx(77)
    assert found["a"] == pytest.approx(11.0 * 77 / 70)


def test_no_layer_found():
    found = times_by_node(parser.parse_model(MODEL), parser.parse_model(OPTIMIZED), {}, ["a", "b"])
    assert found == {"a": 0.0, "b": 0.0}


def test_every_layer_of_a_profiled_network_has_a_time():
    model = onnx.load(ROOT / "models" / "digits_cnn.onnx")
    layers = [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    seconds, optimized = Runtime("cpu", 1).profiled(model, {"input": np.ones((2, 1, 28, 28), np.float32)}, 3)
    assert {len(runs) for runs in seconds.values()} == {3}
    found = times_by_node(model, optimized, seconds, layers)
    assert len(layers) == 11
    assert all(value > 0 for value in found.values())
