"""Look-ups into a graph: constants, consumers, and the roots of moved values."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.model.graph import Graph, after_clamps, attribute, is_movement, upstream


def graph_of(nodes, signature="(float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)", **constants):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "other": 1]> g {signature} {{ {nodes} }}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return Graph(model)


def test_what_is_computed_from_constants_is_constant():
    graph = graph_of("d = Neg (c) e = Add (d, c) f = Add (x, e) y = Relu (f)", c=np.ones(1, np.float32))
    assert graph.constants == {"c", "d", "e"}
    assert graph.constant("c") == np.ones(1)
    assert graph.constant("d") is None  # computed, not stored
    assert (graph.inputs, graph.outputs) == (["x"], ["y"])


def test_a_large_constant_is_not_decoded():
    graph = graph_of("y = Add (x, c)", c=np.zeros(1025, np.float32))
    assert graph.constant("c") is None
    assert "c" in graph.constants


def test_a_sole_consumer_has_no_other_beside_it_nor_an_output():
    graph = graph_of("a = Relu (x) b = Mul (a, a) y = Add (b, x)")
    assert graph.sole_consumer("a").op_type == "Mul"  # twice, but one node
    assert graph.sole_consumer("x") is None
    assert graph.sole_consumer("y") is None


def test_a_body_consumes_what_it_captures():
    text = """a = Relu (x) y = If (p) <then_branch = t () => (float[N, 4, 6, 6] b) { b = Sin (a) },
              else_branch = e () => (float[N, 4, 6, 6] c) { c = Cos (a) }>"""
    graph = graph_of(text, p=np.array(True))
    assert graph.sole_consumer("a").op_type == "If"


def test_the_root_is_where_values_are_computed():
    graph = graph_of("a = Relu (x) b = Transpose <perm = [0, 2, 3, 1]> (a) c = Flatten (b) y = Sin (c)")
    assert [graph.root(name) for name in ("c", "b", "a", "x", "y")] == ["a", "a", "a", "x", "y"]
    assert graph.root("c") == "a"  # from the cache, too


MOVING = {
    "y = MaxPool <kernel_shape = [1, 1]> (x)": True,
    "y, i = MaxPool <kernel_shape = [1, 1]> (x)": False,  # indices are not values of x
    "y = Pad (x, p)": True,
    "y = Pad (x, p, zero)": True,
    "y = Pad (x, p, one)": False,
    'y = Pad <mode = "reflect"> (x, p, one)': True,
    "y = Resize (x, , s)": True,
    'y = Resize <mode = "linear"> (x, , s)': False,
    "y = Gather (table, x)": False,
    "y = other.Flatten (x)": False,
    "y = Relu (x)": False,
}


@pytest.mark.parametrize("node", MOVING)
def test_movement_operators(node):
    one = np.ones(1, np.float32)
    graph = graph_of(node, p=np.zeros(8, np.int64), zero=0 * one, one=one, s=np.ones(4, np.float32), table=one)
    assert is_movement(graph.nodes[0], graph) is MOVING[node]


def test_after_the_clamps_that_alone_consume_a_tensor():
    limit = np.array(6, np.float32)
    assert after_clamps("x", graph_of("a = Relu (x) b = Clip (a, , six) y = Sin (b)", six=limit)) == "b"
    assert after_clamps("x", graph_of("a = Relu (x) b = Min (a, a) y = Sin (b)")) == "a"  # not by a constant
    assert after_clamps("x", graph_of("a = Relu (x) y = Mul (a, x)")) == "x"


def test_upstream_in_execution_order():
    graph = graph_of("a = Relu (x) b = Sin (x) c = Mul (a, x) y = Add (c, a)")
    assert [n.output[0] for n in upstream(["y"], graph.producer)] == ["a", "c", "y"]
    assert upstream(["x"], graph.producer) == []


def test_attributes_have_defaults():
    node = graph_of("y = Flatten <axis = 2> (x)").nodes[0]
    assert (attribute(node, "axis", 1), attribute(node, "other", "none")) == (2, "none")
