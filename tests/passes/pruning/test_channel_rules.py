"""How operators propagate channels: constants as ONNX computes them, slots along the right axis."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.model.graph import Graph
from rdoq_onnx.passes.pruning.channel_rules import Channels, propagate

CONSTANT = np.array([True, False, True])
VALUES = np.array([0.0, 7.0, -2.0], np.float32)
SHAPES = {"x": (1, 3, 4, 4)}
STORED = {
    "two": np.array(2, np.float32),
    "each": np.array([1, 2, 3], np.float32).reshape(3, 1, 1),
    "each_pixel": np.ones((3, 4, 4), np.float32),
    "flat": np.array([1, 48]),
    "spatial": np.array([2, 3]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "minus": np.array(-2, np.float32),
    "up": np.array([1, 1, 2, 2], np.float32),
    "more": np.array([1, 2, 1, 1], np.float32),
    "scale": np.array(0.5, np.float32),
    "zero": np.array(3, np.uint8),
}


def after(node, trailing=2, **others):
    """The channels of the output of `node` for x, whose channels 0 and 2 are constant."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 3, 4, 4] x) => (float[M] y) {{ {node} }}""")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in STORED.items())
    inputs = {"x": Channels(np.array([10, 11, 12]), VALUES, CONSTANT, trailing)}
    return propagate(model.graph.node[0], inputs | others, Graph(model), SHAPES)


KEPT = {
    "y = Relu (x)": [0, 0],
    "y = Sigmoid (x)": [0.5, 1 / (1 + np.exp(2))],
    "y = Mul (x, two)": [0, -4],
    "y = Sub (x, each)": [-1, -5],
    "y = QuantizeLinear (x, scale, zero)": [3, 0],
    "y = MaxPool <kernel_shape = [2, 2]> (x)": [0, -2],
    "y = AveragePool <kernel_shape = [2, 2]> (x)": [0, -2],
    "y = ReduceMean <axes = [2, 3]> (x)": [0, -2],
    "y = Resize (x, , up)": [0, -2],
    'y = Pad <mode = "edge"> (x, pads)': [0, -2],
}


@pytest.mark.parametrize("node", KEPT)
def test_constants_are_computed_and_slots_stay(node):
    found = after(node)
    assert found.slots.tolist() == [10, 11, 12]
    assert found.constant.tolist() == CONSTANT.tolist()
    np.testing.assert_allclose(found.values[CONSTANT], KEPT[node], rtol=1e-6)


VARYING = {
    "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)": [0],
    "y = Pad (x, pads)": [0],
    "y = Pad (x, pads, minus)": [2],
    "y = Add (x, each_pixel)": [],
}


@pytest.mark.parametrize("node", VARYING)
def test_what_no_longer_is_equal_at_all_positions(node):
    assert np.flatnonzero(after(node).constant).tolist() == VARYING[node]


def test_zero_times_anything_is_zero():
    other = Channels(np.array([20, 21, 22]), VALUES, np.zeros(3, bool), 2)
    assert after("y = Mul (x, z)", z=other).constant.tolist() == [True, False, False]
    assert not after("y = Add (x, z)", z=other).constant.any()


def test_flattened_channels_are_repeated():
    for node in ("y = Flatten (x)", "y = Reshape (x, flat)"):
        found = after(node)
        assert found.slots.tolist() == [10] * 16 + [11] * 16 + [12] * 16
        assert found.trailing == 0
    assert after("y = Squeeze (x, spatial)").trailing == 0


def test_concatenated_channels_are_in_order():
    other = Channels(np.array([20]), np.zeros(1, np.float32), np.ones(1, bool), 2)
    for axis in (1, -3):
        assert after(f"y = Concat <axis = {axis}> (z, x)", z=other).slots.tolist() == [20, 10, 11, 12]
    assert after("y = Concat <axis = 2> (z, x)", z=other) is None


@pytest.mark.parametrize(
    "node",
    [
        "y = Softmax (x)",
        "y = Add (x, unknown)",
        "y = Resize (x, , more)",
        "y = Flatten <axis = 2> (x)",
        "y = ReduceMean <axes = [1]> (x)",
        "y = QuantizeLinear (x, scale)",
    ],
)
def test_unsupported_operators_are_not_propagated(node):
    assert after(node) is None
