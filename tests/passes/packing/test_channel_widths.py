"""The width and window of each channel: the least that hold its integers, along the axis of its scales."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import numpy_helper, parser

from rdoq_onnx.passes.packing.channel_widths import read_weights

WINDOWS = {
    (0, 0): (0, 0),
    (-1, 0): (1, 0),
    (0, 1): (1, 1),
    (-1, 1): (2, 0),
    (-2, 1): (2, 0),
    (-1, 2): (2, 1),
    (-2, 2): (3, 0),
    (0, 64): (7, 1),
    (-64, 64): (8, 0),
    (-128, 127): (8, 0),
}


def weight(integers, nodes="f = DequantizeLinear <axis = 0> (w, s) y = Identity (f)", scales=()):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g () => (float[M] y) {{ {nodes} }}')
    model.graph.initializer.append(numpy_helper.from_array(integers, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(scales, np.float32), "s"))
    found = read_weights(model, ["w", "w"])
    assert len(found) == 1
    return found[0]


def test_the_least_window_that_holds_a_channel():
    found = weight(np.array(list(WINDOWS), np.int8))
    assert list(zip(found.bits.tolist(), found.shift.tolist(), strict=True)) == list(WINDOWS.values())


@given(arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_no_narrower_window_would_do(integers):
    found = weight(integers)
    for row, bits, shift in zip(integers.astype(int), found.bits.astype(int), found.shift, strict=True):
        low = int(shift) - (2**bits >> 1)
        assert low <= row.min() <= row.max() < low + 2**bits
        narrower = 2**bits >> 1
        windows = {h - (narrower >> 1) for h in (0, 1)} if narrower > 1 else {0} if narrower else set()
        assert not any(w <= row.min() and row.max() < w + narrower for w in windows)


@pytest.mark.parametrize(
    ("nodes", "scales", "axis"),
    [
        ("f = DequantizeLinear <axis = 1> (w, s) y = Identity (f)", (3,), 1),
        ("f = DequantizeLinear <axis = -1> (w, s) y = Identity (f)", (4,), 2),
        ("f = DequantizeLinear (w, s) y = Identity (f)", (3,), 1),
        ("c = Cast <to = 6> (w) d = Cast <to = 1> (c) f = Mul (d, s) y = Identity (f)", (3, 1), 1),
        ("c = Cast <to = 1> (w) f = Mul (d, s) y = Identity (f)", (2, 1, 1), 0),
        ("y = Identity (w)", (), 0),
    ],
)
def test_the_axis_of_the_channels(nodes, scales, axis):
    integers = np.arange(24, dtype=np.int8).reshape(2, 3, 4)
    found = weight(integers, nodes, scales)
    assert found.axis == axis
    np.testing.assert_array_equal(found.channels_first, np.moveaxis(integers, axis, 0))
    assert found.rows.shape == (integers.shape[axis], 24 // integers.shape[axis])
