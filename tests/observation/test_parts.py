"""The parts of outputs: what is measured apart, logits for saturating outputs, nothing of constants and copies."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.observation.parts import CACHES, find_parts, measured_tensors
from tests.observation.test_observe import network


def test_logits_of_saturating_outputs_are_measured_except_for_maps():
    image, kernel = "(float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y)", (3, 2, 1, 1)
    cases = {
        "z": network("z = MatMul (x, w) y = Sigmoid (z)"),
        "s": network("s = MatMul (x, w) p = Softmax (s) y = Identity (p)"),
        "y": network("c = Conv (x, w) b = Add (c, one) y = Sigmoid (b)", image, kernel, one=np.ones(1, np.float32)),
    }
    for target, net in cases.items():
        assert measured_tensors(find_parts(net.model)) == [target]
    softmax = network("c = Conv (x, w) y = Softmax <axis = 1> (c)", image, kernel)
    assert measured_tensors(find_parts(softmax.model)) == ["c"]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("z = Neg (x) y = Softmax (z)", ["z"]),
        ("z = Neg (x) s = Sigmoid (z) y = Transpose (s)", ["z"]),
        ("z = Neg (x) s = Softmax (z) y = Neg (s)", ["y"]),  # its output is processed further
        ("z = Neg (x) y = Cast <to = 10> (z)", ["z"]),
        ("z = Neg (x) y = Cast <to = 7> (z)", ["y"]),
        ("z = Neg (x) s = Softmax (z) y = Cast <to = 10> (s)", ["z"]),
    ],
)
def test_what_is_measured_of_an_output(nodes, expected):
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, M] y) {{ {nodes} }}""")
    assert measured_tensors(find_parts(model)) == expected


def test_logits_of_two_outputs_are_measured_once():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] p, float[N, 4] z) { z = Neg (x) p = Softmax (z) }""")
    assert measured_tensors(find_parts(model)) == ["z"]


def parts_of(signature, nodes, **constants):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return [(p.name, p.output, [(q.measured, q.kind) for q in p.pieces]) for p in find_parts(model)]


WEIGHT = np.ones((4, 4), np.float32)
X, Y = "(float[N, 4] x) => (float[N, M] y)", "(float[N, 4] x) => (float[N, 2] y)"


def test_what_a_concat_joins_is_measured_apart():
    nodes = """a = MatMul (x, w) b = Mul (a, k) c = MatMul (x, w) s = Softmax (c) j = Concat <axis = 1> (b, s, x, k)
        t = Transpose <perm = [1, 0]> (j) y = Add (t, k)"""
    found = parts_of(X, nodes, w=WEIGHT, k=np.ones((1, 4), np.float32))
    assert found == [("a", "y", [("a", "joined")]), ("s", "y", [("c", "joined")])]


def test_an_unrolled_loop_is_one_part():
    steps = " ".join(f"h{k} = MatMul (x, w)" for k in range(20))
    joined = ", ".join(f"h{k}" for k in range(20))
    assert parts_of(X, f"{steps} y = Concat <axis = 1> ({joined})", w=WEIGHT) == [("y", "y", [("y", "whole")])]


def test_constants_and_copies_are_no_part():
    signature = "(float[N, 4] x) => (float[N, 4] y, float[N, 4] copy, float[4, 4] anchors, int64[2] size)"
    nodes = "y = MatMul (x, w) copy = Identity (x) anchors = Identity (w) size = Shape (x)"
    assert parts_of(signature, nodes, w=WEIGHT) == [("y", "y", [("y", "whole")])]


@pytest.mark.parametrize(
    "selection",
    [
        "i = NonZero (b) ti = Transpose (i) y = GatherND (s, ti)",
        "r = Reshape (b, m) y = Compress (f, r)",
        "v, i = TopK (s, two) y = GatherElements <axis = 1> (s, i)",
        "v, i = TopK (s, two) y = Mul (v, v)",
    ],
)
def test_values_are_measured_in_front_of_a_selection(selection):
    nodes = f"s = MatMul (x, w) b = Greater (s, zero) f = Reshape (s, m) {selection}"
    found = parts_of(Y, nodes, w=WEIGHT, zero=np.float32(0), m=np.array([-1]), two=np.array([2]))
    assert found
    assert {kind for _, _, pieces in found for _, kind in pieces} == {"selected"}
    assert {measured for _, _, pieces in found for measured, _ in pieces} <= {"s", "f"}


def test_a_selection_of_inputs_or_within_the_network_is_none():
    nodes = "v, i = TopK (x, two) g = GatherElements <axis = 1> (x, i) y = MatMul (g, w)"
    assert parts_of(Y, nodes, w=WEIGHT[:2, :2], two=np.array([2])) == [("y", "y", [("y", "whole")])]
    nodes = "a = MatMul (x, w) v, i = TopK (x, two) y = GatherElements <axis = 1> (a, i)"
    assert parts_of(Y, nodes, w=WEIGHT, two=np.array([2])) == [("y", "y", [("y", "whole")])]


def test_caches_are_one_part_and_their_old_entries_none():
    signature = """(float[N, 1, 4] x, float[N, P, 4] past_k, float[N, P, 4] past_v, float[N, 4] h)
        => (float[N, 1, 4] y, float[N, Q, 4] present_k, float[N, Q, 4] present_v, float[N, 4] hn)"""
    nodes = """k = MatMul (x, w) v = MatMul (x, w) present_k = Concat <axis = 1> (past_k, k)
        present_v = Concat <axis = 1> (past_v, v) hn = MatMul (h, w) y = Add (k, v)"""
    assert parts_of(signature, nodes, w=WEIGHT) == [
        ("y", "y", [("y", "whole")]),
        (CACHES, "present_k and 2 more", [("k", "joined"), ("v", "joined"), ("hn", "whole")]),
    ]


def test_a_branch_on_a_constant_depends_on_what_it_captures():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] y) <bool t = {1}> {
        y = If (t) <then_branch = one () => (float[N, 4] a) { a = Tanh (x) },
                    else_branch = two () => (float[N, 4] b) { b = Relu (x) }> }""")
    assert [piece.measured for part in find_parts(model) for piece in part.pieces] == ["y"]
