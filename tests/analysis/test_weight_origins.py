"""Initializers of a weight, traced through slices, joins and transpositions, with their axes."""

from collections import ChainMap

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.weight_origins import Scope, origins, walk

FOUND = {
    "y = Sin (w)": {("w", (0, 1))},
    "a = Slice (w, zero, one) y = Sin (a)": {("w", (0, 1))},
    "a = Transpose (w) y = Sin (a)": {("w", (1, 0))},
    "a = Concat <axis = 0> (w, v) b = Transpose <perm = [1, 0]> (a) y = Sin (b)": {("w", (1, 0)), ("v", (1, 0))},
    "a = Unsqueeze (w, zero) y = Sin (a)": {("w", (None, 0, 1))},
    "a = Unsqueeze (w, zero) b = Transpose <perm = [2, 0, 1]> (a) y = Sin (b)": {("w", (1, None, 0))},
    "a = Squeeze (u, zero) y = Sin (a)": {("u", (1, 2))},
    "c = Constant <value_ints = [0]> () a = Squeeze (u, c) y = Sin (a)": {("u", (1, 2))},
}
LOST = {
    "y = Sin (x)": "it is computed, so there is no weight",
    "a = Neg (w) y = Sin (a)": "'a' comes from a Neg",
    "a = Slice (x, zero, one) y = Sin (a)": "it is computed",
    "c = Neg (zero) a = Unsqueeze (w, c) y = Sin (a)": "along computed axes",
    "a = DequantizeLinear (q, s) y = Sin (a)": "already quantized",
}


def origins_of(nodes):
    """The origins of the input of the Sin."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[3, 4] x) => (float[M] y) {{ {nodes} }}""")
    stored = {"w": np.ones((3, 4)), "v": np.ones((2, 4)), "u": np.ones((1, 3, 4)), "s": np.array(1.0)}
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    stored |= {"zero": np.array([0]), "one": np.array([1]), "q": np.ones((3, 4), np.int8)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    node, scope = next((n, s) for n, s in walk(model.graph) if n.op_type == "Sin")
    return origins(node.input[0], node, scope)


@pytest.mark.parametrize("nodes", FOUND)
def test_initializers_and_their_axes(nodes):
    assert {(o.tensor.name, o.axes) for o in origins_of(nodes)} == FOUND[nodes]


@pytest.mark.parametrize("nodes", LOST)
def test_an_untraceable_weight_has_a_reason(nodes):
    assert LOST[nodes] in origins_of(nodes).reason


def test_a_chain_without_end_is_given_up():
    joins = " ".join(f"a{k + 1} = Concat <axis = 0> (a{k}, a{k})" for k in range(9))
    assert "assembled from too many constants" in origins_of(f"a0 = Identity (w) {joins} y = Sin (a9)").reason


def test_names_in_a_body_shadow_outer_ones():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x, bool p) => (float[2] y) <float[1] w = {1}>
        { y = If (p) <then_branch = t () => (float[2] b) <float[1] w = {2}> { b = Mul (x, w) },
                      else_branch = e () => (float[2] c) { c = Add (x, w) }> }""")
    scopes = {node.op_type: scope for node, scope in walk(model.graph)}
    values = {op: numpy_helper.to_array(scope.stored["w"]).item() for op, scope in scopes.items()}
    assert values == {"If": 1, "Mul": 2, "Add": 1}
    assert [len(scopes[op].owners) for op in ("If", "Mul")] == [0, 1]
    assert Scope(ChainMap(), ChainMap()).integers("w") is None
