"""Costs of nodes by widths: presets by their formula, files by their rows, and what between rows is refused."""

import numpy as np
import pytest

from rdoq_onnx.cost.tables import BITS, IN_FLOAT, at_8_bits, node_costs, typical_widths
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import parse_cost, preset
from tests.allocation.test_budget import measurement

HEAD = "layer,weight_bits,activation_bits,cost\n"
SIZES = {"x": 48, "z1": 64, "a1": 64, "z2": 64, "r": 64, "y": 80}
NETWORK = measurement().network


def tables(rows, interpolated=False):
    return {n.node: n.cost for n in node_costs(NETWORK, SIZES, parse_cost(HEAD + rows, "t.csv", interpolated))}


def test_bit_operations():
    nodes = node_costs(NETWORK, SIZES, preset("bops"))
    assert [(n.node, n.layer, n.data) for n in nodes] == [
        ("first", 0, ("x",)),
        ("second", 1, ("a1",)),
        ("third", 2, ("r",)),
    ]
    macs = [16 * 4 * 3, 16 * 4 * 4, 16 * 5 * 4]
    for node, work in zip(nodes, macs, strict=True):
        assert node.cost[3, 5] == 15 * work
        assert node.cost[0, 8] == 0
        assert node.cost[4, IN_FLOAT] == 128 * work
    assert at_8_bits(nodes, {"x", "a1", "r"}) == 64 * sum(macs)
    assert at_8_bits(nodes, {"x", "a1"}) == 64 * sum(macs[:2]) + 256 * macs[2]


def test_bytes():
    nodes = node_costs(NETWORK, SIZES, preset("size"))
    assert [n.cost[4, 2] for n in nodes] == [6, 8, 10]
    assert all((n.cost == n.cost[:, :1]).all() for n in nodes)


def test_the_last_row_that_matches_counts():
    found = tables(".*,*,*,7\nsecond,1-4,*,3\nsecond,2,8,1\n")
    assert (found["first"] == 7).all()
    assert found["second"][:, 8].tolist() == [7, 3, 1, 3, 3, 7, 7, 7, 7, 7]
    assert found["second"][2, 7] == 3


def test_rows_match_the_name_of_a_weight():
    found = tables(".*,*,*,7\nw3,*,*,1\n")
    assert (found["third"] == 1).all()
    assert (found["first"] == 7).all()


def test_widths_between_rows_are_refused_or_on_a_line():
    rows = ".*,2,4,4\n.*,8,4,16\n.*,2,8,8\n.*,8,8,32\n"
    refused, line = tables(rows)["first"], tables(rows, interpolated=True)["first"]
    assert np.flatnonzero(np.isfinite(refused[:, 4])).tolist() == [2, 8]
    assert np.isinf(refused[:, 5]).all()
    for w, a in np.ndindex(9, 9):
        inside = 2 <= w <= 8 and 4 <= a <= 8
        assert line[w, a] == (pytest.approx(w * a / 2) if inside else np.inf)
    assert np.isinf(line[IN_FLOAT]).all()


def test_float_inputs_are_interpolated_by_themselves():
    found = tables(".*,2,float,2\n.*,8,float,8\n.*,8,8,1\n", interpolated=True)["first"]
    assert found[:, IN_FLOAT].tolist() == [np.inf, np.inf, 2, 3, 4, 5, 6, 7, 8, np.inf]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("firts,8,8,1\n", "layer 'firts' matches no layer or product; the nearest is 'first'"),
        ("first,8,8,1\nthird,8,8,1\n", "has no row for 'second'; give one, or one for '.*'"),
    ],
)
def test_rows_and_nodes_must_fit(rows, said):
    with pytest.raises(ConfigError, match=f"--cost t.csv: {said}"):
        tables(rows)


def test_8_bits_that_no_row_states():
    assert at_8_bits(node_costs(NETWORK, SIZES, parse_cost(f"{HEAD}.*,4,8,1\n", "t.csv")), {"x", "a1", "r"}) is None


def test_activations_lose_bits_last():
    quantized = {"x", "a1", "r"}
    nodes = node_costs(NETWORK, SIZES, preset("bops"))
    for share in (0.2, 0.5, 0.9):
        weights, activations = typical_widths(share, nodes, quantized)
        assert 0 < weights < activations < 8
    assert typical_widths(3, nodes, quantized) == (8, 8)
    assert typical_widths(0.5, node_costs(NETWORK, SIZES, preset("size")), quantized) == (4, 8)
    times = parse_cost(f"{HEAD}.*,0,*,0\n.*,1-8,*,5\n", "t.csv")
    assert typical_widths(0.5, node_costs(NETWORK, SIZES, times), quantized) == (8, 8)
    assert BITS[-1] == 32
