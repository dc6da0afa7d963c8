"""Layers as a file stores them: blocks, scales and biases, and the forms that are refused."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.model.graph import Graph
from rdoq_onnx.passes.pruning.stored_layers import read_layer

RNG = np.random.default_rng(0)
FLOATS = {
    "w": RNG.standard_normal((4, 3, 3, 3), np.float32),
    "group": RNG.standard_normal((6, 1, 3, 3), np.float32),
    "m": RNG.standard_normal((3, 5), np.float32),
    "b": RNG.standard_normal(4).astype(np.float32),
    "q": RNG.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8),
    "qb": np.array([5, -3, 0, 7], np.int32),
    "s": np.array([0.5, 1, 2, 4], np.float32),
    "t": np.array(0.25, np.float32),
    "z": np.array(3, np.uint8),
    "odd": np.array([1, 0, 0, 0], np.int8),
}
INTEGERS = """d = DequantizeLinear (codes, t, z) v = DequantizeLinear <axis = 0> (q, s) k = Mul (s, t)
    c = DequantizeLinear <axis = 0> (qb, k) y = Conv (d, v, c)"""


def layer(nodes, signature="(float[1, 3, 6, 6] x, uint8[1, 3, 6, 6] codes, float[4] free) => (float[1, 4, H, W] y)"):
    """The last node of the graph, as stored."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in FLOATS.items())
    graph = Graph(model)
    return read_layer(graph.nodes[-1], graph)


def test_a_float_convolution():
    found = layer("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)")
    np.testing.assert_array_equal(found.blocks, FLOATS["w"].reshape(1, 4, 3, 9))
    assert (found.scales, found.codes, found.padded, found.spatial) == (None, None, True, 2)
    assert (found.inputs, found.outputs, found.depthwise) == (3, 4, False)
    np.testing.assert_array_equal(found.bias, FLOATS["b"])
    data = np.array([2.0, 0, -1])
    expected = (FLOATS["w"].sum((2, 3), np.float64) * data).sum(axis=1)
    np.testing.assert_allclose(found.summed(data), expected, rtol=1e-6)
    np.testing.assert_allclose(found.values(found.summed(data)), FLOATS["b"] + expected, rtol=1e-5)


def test_a_convolution_in_integers():
    found = layer(INTEGERS)
    assert (found.codes.tensor, found.codes.zero_point, found.codes.scale) == ("codes", 3, 0.25)
    data = np.array([1, 0, -2])
    sums = FLOATS["q"].sum((2, 3), np.int64) @ data
    added = found.summed(data)
    assert added.dtype == np.int64
    np.testing.assert_array_equal(added, sums)
    np.testing.assert_array_equal(found.values(added), ((FLOATS["qb"] + sums) * FLOATS["s"] * 0.25).astype(np.float32))
    assert found.reach(data) >= np.abs(FLOATS["qb"] + sums).max()


def test_weights_after_a_cast_have_scales_as_well():
    found = layer("i = Cast <to = 1> (q) v = Mul (i, s) y = Conv (x, v)")
    assert found.blocks.dtype == np.int8
    np.testing.assert_array_equal(found.scales, FLOATS["s"])
    assert found.bias is None


def test_a_depthwise_convolution():
    found = layer("h = Concat <axis = 1> (x, x) y = Conv <group = 6> (h, group)")
    assert found.depthwise
    assert found.blocks.shape == (6, 1, 1, 9)


@pytest.mark.parametrize("nodes", ["z1 = MatMul (x, m)", "z1 = Gemm (x, m)"])
def test_a_matrix_has_its_outputs_first(nodes):
    found = layer(nodes, "(float[2, 3] x) => (float[2, 5] z1)")
    np.testing.assert_array_equal(found.blocks[0, :, :, 0], FLOATS["m"].T)


def test_the_bias_of_a_matmul_is_the_add_that_is_its_only_consumer():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 5] y)
        { [mul] h = MatMul (x, m) [add] y = Add (h, b) }""")
    stored = {"m": FLOATS["m"], "b": np.ones(5, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    graph = Graph(model)
    assert read_layer(graph.nodes[0], graph).adder.name == "add"


REFUSED = {
    "a weight that is computed": "v = Neg (w) y = Conv (x, v)",
    "a weight that is fed": "y = Conv (x, x)",
    "a bias that is fed": "y = Conv (x, w, free)",
    "a zero point of weights": "v = DequantizeLinear <axis = 0> (q, s, odd) y = Conv (x, v)",
    "a weight that others read": "v = DequantizeLinear <axis = 0> (q, s) u = Neg (v) y = Conv (x, v)",
    "a scaled Gemm": "y = Gemm <alpha = 2.0> (x, m)",
    "a transposed input": "y = Gemm <transA = 1> (x, m)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_forms_that_are_refused(kind):
    assert layer(REFUSED[kind]) is None
