"""The tape of adjoint rules: fresh names, shared constants, sums over broadcast axes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rdoq_onnx.gradients.tape import Tape, attribute, only

SHAPES = {"x": (2, 3), "row": (3,), "column": (2, 1), "one": (), "whole": (2, 3)}


@pytest.fixture
def tape():
    return Tape(SHAPES, dict.fromkeys(SHAPES, TensorProto.FLOAT), {}, 17, lambda node, feeds: None, {"adj/Neg_0"})


def evaluate(tape, output, value, ort_run):
    inputs = [helper.make_tensor_value_info("v", TensorProto.FLOAT, value.shape)]
    ends = [onnx.ValueInfoProto(name=output)]
    graph = helper.make_graph(tape.nodes, "g", inputs, ends, [*tape.initializers.values()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", tape.opset)], ir_version=8)
    return ort_run(model, {"v": value})[0]


def test_names_are_those_that_the_graph_does_not_use(tape):
    assert tape.op("Neg", "x") == "adj/Neg_0_1"
    assert tape.nodes[0].name == tape.nodes[0].output[0]


def test_equal_constants_are_one(tape):
    names = {tape.constant([1, 2]), tape.constant(np.array([1, 2])), tape.constant((1, 2))}
    assert len(names) == 1
    assert tape.constant([1, 2], "x") not in names  # another type
    assert tape.constant([[1, 2]]) not in names  # another shape


@pytest.mark.parametrize("target", SHAPES)
def test_adjoints_are_summed_over_what_was_broadcast(tape, ort_run, target):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = evaluate(tape, tape.unbroadcast(tape.op("Identity", "v"), (2, 3), target), value, ort_run)
    shape = SHAPES[target]
    padded = (1,) * (2 - len(shape)) + shape
    axes = tuple(k for k in range(2) if padded[k] == 1)
    np.testing.assert_array_equal(found, value.sum(axes, keepdims=True).reshape(shape))


@pytest.mark.parametrize("opset", [17, 18])
def test_means_in_the_form_of_the_opset(tape, ort_run, opset):
    tape.opset = opset
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(evaluate(tape, tape.mean("v", [0]), value, ort_run), value.mean(0, keepdims=True))


def test_negative_pads_crop(tape, ort_run):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = evaluate(tape, tape.pad("v", [1, -1], [0, 0]), value, ort_run)
    np.testing.assert_array_equal(found, np.pad(value[:, 1:], ((1, 0), (0, 0))))
    assert tape.pad("v", [0, 0], [0, 0]) == tape.scale("v", 1, "x") == "v"


def test_attributes_are_text_where_they_are_bytes():
    node = helper.make_node("Pad", ["x", "p"], ["y"], mode="edge")
    assert (attribute(node, "mode"), attribute(node, "axis", 3)) == ("edge", 3)
    assert only(node, "g") == ["g", None]
