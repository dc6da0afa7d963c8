"""Constant channels, and coupled channels, which can only be removed together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from rdoq_onnx.passes.pruning.constant_channels import ConstantChannels, Coupling


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_coupling_is_an_equivalence(pairs):
    """Against connected components found by propagating labels until nothing changes."""
    coupling = Coupling()
    slots = coupling.new(10)
    labels = list(range(10))
    for a, b in pairs:
        coupling.unite_all(slots[[a]], slots[[b]])
        labels = [labels[b] if label == labels[a] else label for label in labels]
    roots = coupling.roots(slots)
    assert (roots[:, None] == roots).tolist() == (np.array(labels)[:, None] == labels).tolist()


def test_the_first_reason_of_coupled_slots_counts():
    coupling = Coupling()
    slots = coupling.new(3)
    coupling.fix(slots[1:2], "first")
    coupling.fix(slots[:1], "second")
    coupling.unite_all(slots[:1], slots[1:2])
    assert coupling.fixed() == {coupling.find(0): "first"}


def channels(nodes, **weights):
    """Weights of ones unless given; row 1 of the first layer is zero."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 2, 5, 5] x) => (float[1, 2, H, W] y) {{ [first] a = Conv (x, w, b) {nodes} }}""")
    w = np.ones((3, 2, 1, 1), np.float32)
    w[1] = 0
    stored = {"w": w, "b": np.array([1, -2, 3], np.float32), "v": np.ones((2, 3, 3, 3), np.float32)} | weights
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return ConstantChannels(model)


def test_a_row_of_zeros_is_its_bias():
    found = channels("c = Abs (a) [second] y = Conv (c, v)")
    assert found.channels["a"].constant.tolist() == [False, True, False]
    assert (found.channels["a"].values[1], found.channels["c"].values[1]) == (-2, 2)
    second = found.layers["second"]
    np.testing.assert_array_equal(found.summands(second, np.ones(3, bool)), [0, 2, 0])
    assert not found.summands(second, np.zeros(3, bool)).any()


def test_a_layer_that_reads_only_constants_is_constant():
    v = np.zeros((2, 3, 3, 3), np.float32)
    v[1, 1] = 0.5
    found = channels("y = Conv (a, v)", v=v)
    assert found.channels["y"].constant.tolist() == [True, True]
    assert found.channels["y"].values.tolist() == [0, -9]
    padded = channels("y = Conv <pads = [1, 1, 1, 1]> (a, v)", v=v)
    assert padded.channels["y"].constant.tolist() == [True, False]


def test_an_add_couples_its_inputs():
    found = channels("[other] c = Conv (x, w) d = Add (a, c) y = Conv (d, v)")
    roots = [found.coupling.roots(found.channels[name].slots).tolist() for name in "acd"]
    assert roots[0] == roots[1] == roots[2]
    assert len(set(roots[0])) == 3


@pytest.mark.parametrize(
    ("nodes", "tensor", "reason"),
    [
        ("[soft] c = Softmax <axis = 1> (a) y = Conv (c, v)", "a", "Softmax soft reads it"),
        ("y = Conv (a, v)", "y", "it is an output of the network"),
    ],
)
def test_kept_channels_have_reasons(nodes, tensor, reason):
    found = channels(nodes)
    fixed = found.coupling.fixed()
    assert {fixed.get(root) for root in found.coupling.roots(found.channels[tensor].slots).tolist()} == {reason}
