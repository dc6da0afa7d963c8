"""The window of a convolution; adjoints of its kernel are in test_reverse.py."""

import pytest
from onnx import helper

from rdoq_onnx.gradients.window import Window


@pytest.mark.parametrize(("mode", "begins"), [("SAME_UPPER", (0, 1)), ("SAME_LOWER", (1, 1)), ("VALID", (0, 0))])
def test_padding_in_front(mode, begins):
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[2, 1])
    target = (4, 7) if mode == "VALID" else (4, 9)
    window = Window.of(node, (8, 9), target, (3, 3))
    assert window.begins == begins
    assert window.reach == (2, 2)


def test_explicit_padding_and_dilations():
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 2, 3, 4], dilations=[2, 3])
    window = Window.of(node, (9, 9), (9, 9), (3, 2))
    assert window.begins == (1, 2)
    assert window.strides == (1, 1)
    assert window.reach == (4, 3)
