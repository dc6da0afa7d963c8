"""Protobuf graphs: execution order, names in bodies, copies with other outputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, helper, parser

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.protos import (
    all_names,
    all_nodes,
    captured,
    common_sizes,
    copy_fields,
    declared,
    default_opset,
    execution_order,
    live_nodes,
    reads,
    rename,
    with_outputs,
)

BODIES = """<ir_version: 8, opset_import: ["other": 1, "": 17]>
g (float[2] x, bool p) => (float[2] y)
{ a = Relu (x)
  [choice] y = If (p) <then_branch = t () => (float[2] b) { s = Sin (a) b = Mul (s, x) },
                       else_branch = e () => (float[2] a) { }> }"""


@given(st.permutations(range(6)))
def test_execution_order_puts_producers_first(places):
    """A chain of nodes, in any order in the file."""
    nodes = [helper.make_node("Relu", [f"t{k}"], [f"t{k + 1}"]) for k in places]
    assert [places[index] for index in execution_order(nodes)] == list(range(6))


def test_execution_order_keeps_a_valid_order():
    nodes = [helper.make_node("Relu", ["x"], [name]) for name in "cab"]
    assert execution_order(nodes) == [0, 1, 2]


def test_a_cycle_is_refused_by_name():
    nodes = [helper.make_node("Relu", ["b"], ["a"], "first"), helper.make_node("Relu", ["a"], ["b"], "second")]
    with pytest.raises(ModelError, match=r"'(first|second)' is part of a cycle"):
        execution_order(nodes)


def test_live_nodes_are_those_needed():
    pairs = (("x", "a"), ("x", "b"), ("a", "c"), ("b", "d"))
    nodes = [helper.make_node("Relu", [one], [other]) for one, other in pairs]
    assert live_nodes(nodes, range(4), {"c"}, set()) == [0, 2]
    assert live_nodes(nodes, range(4), set(), {3}) == [1, 3]
    assert live_nodes(nodes, range(4), set(), set()) == []


def test_bodies_read_what_they_capture():
    model = parser.parse_model(BODIES)
    choice = model.graph.node[1]
    assert set(captured(choice)) == {"a", "x"}  # the second branch outputs a tensor of the enclosing graph
    assert set(reads([choice])) == {"p", "a", "x"}
    assert [n.op_type for n in all_nodes(model.graph)] == ["Relu", "If", "Sin", "Mul"]
    assert {"choice", "s", "b", "x", "y"} <= set(all_names(model.graph))


def test_rename_goes_into_bodies():
    model = parser.parse_model(BODIES)
    rename(model.graph.node, {"a": "z", "s": "w"})
    assert {"z", "w"} <= set(all_names(model.graph))
    assert not {"a", "s"} & set(all_names(model.graph))


def test_a_copy_with_other_outputs():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 6] x) => (float[N, 6] y) { z = Relu (x) y = Tanh (z) }""")
    changed = with_outputs(model, ["z", "x", "y"])
    assert [o.name for o in changed.graph.output] == ["z", "x", "y"]
    assert changed.graph.output[2] == model.graph.output[0]
    assert [o.name for o in model.graph.output] == ["y"]


def test_the_opset_is_that_of_the_standard_operators():
    assert default_opset(parser.parse_model(BODIES)) == 17
    assert default_opset(ModelProto()) == 0


def test_a_declared_tensor_has_its_type_and_the_sizes_that_are_known():
    kind = declared("x", np.zeros((2, 3), np.int8), common_sizes([(2, 3), (4, 3)])).type.tensor_type
    assert helper.tensor_dtype_to_np_dtype(kind.elem_type) == np.int8
    assert [d.WhichOneof("value") for d in kind.shape.dim] == [None, "dim_value"]
    assert kind.shape.dim[1].dim_value == 3


def test_all_but_skipped_fields_are_copied():
    model, copy = parser.parse_model(BODIES), ModelProto()
    model.metadata_props.add(key="a", value="b")
    copy_fields(model, copy, skip={"graph"})
    assert not copy.HasField("graph")
    copy.graph.CopyFrom(model.graph)
    assert copy == model
