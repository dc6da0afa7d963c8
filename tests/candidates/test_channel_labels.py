"""Channels keep their elements when values move."""

import numpy as np
import pytest
from onnx import helper

from rdoq_onnx.candidates.channel_labels import collapsed, downstream, of_rank, upstream

SHAPES = {"x": (2, 6, 4, 5), "flat": (2, 6, 20), "turned": (2, 4, 6, 5), "pooled": (2, 6, 1, 1)}
CHANNELS = np.arange(6).reshape(6, 1, 1)


def node(op_type, output, **attributes):
    return helper.make_node(op_type, ["x"], [output], **attributes)


MOVES = {
    "Reshape": (node("Reshape", "flat"), np.arange(6).reshape(1, 6, 1)),
    "Transpose": (node("Transpose", "turned", perm=[0, 2, 1, 3]), np.arange(6).reshape(1, 1, 6, 1)),
    "GlobalAveragePool": (node("GlobalAveragePool", "pooled"), CHANNELS),
}


@pytest.mark.parametrize("kind", MOVES)
def test_channels_pass(kind):
    move, expected = MOVES[kind]
    moved = downstream(move, CHANNELS, SHAPES)
    np.testing.assert_array_equal(moved, expected)
    back = upstream(move, move.output[0], moved, SHAPES)
    np.testing.assert_array_equal(of_rank(back, 4), of_rank(CHANNELS, 4))


def test_a_function_that_is_not_homogeneous_stops_them():
    assert downstream(helper.make_node("Sigmoid", ["x"], ["flat"]), CHANNELS, SHAPES) is None


def test_a_split_labels_its_other_parts_as_no_channel():
    split = helper.make_node("Split", ["x"], ["a", "b"], axis=1)
    labels = upstream(
        split, "b", np.arange(4).reshape(4, 1, 1), {"x": (2, 6, 3, 3), "a": (2, 2, 3, 3), "b": (2, 4, 3, 3)}
    )
    np.testing.assert_array_equal(labels.reshape(-1), [-1, -1, 0, 1, 2, 3])


def test_merging_with_the_batch_repeats_channels():
    merge = helper.make_node("Reshape", ["x", "shape"], ["y"])
    labels = downstream(merge, np.arange(3).reshape(3, 1), {"x": (2, 3, 4), "y": (6, 4)})
    np.testing.assert_array_equal(labels.reshape(-1), [0, 1, 2, 0, 1, 2])


def test_collapsed_keeps_only_axes_that_differ():
    assert collapsed(np.broadcast_to(CHANNELS, (2, 6, 4, 5))).shape == (1, 6, 1, 1)
