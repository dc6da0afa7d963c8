"""Rate-distortion frontiers fall, uniform widths lie above them, and the run's allocation is a point of them."""

from itertools import pairwise

import pytest

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.allocation.frontier import UNIFORM, frontiers
from rdoq_onnx.config import Budgets
from tests.allocation.test_budget import measurement


@pytest.mark.parametrize(
    ("budgets", "sides"),
    [
        (Budgets(weight_bits=4, activation_bits=6), ["weights", "activations"]),
        (Budgets(weight_bits=4, activation_bits=4, joint=True), ["both"]),
        (Budgets(weight_bits=4, activation_bits=None), ["weights"]),
    ],
)
def test_a_frontier_for_each_budget(budgets, sides):
    measured = measurement(activation_bits=budgets.activation_bits)
    allocation = allocate_bits(measured, budgets)
    found = frontiers(allocation, budgets)
    assert [f.side for f in found] == sides
    for frontier in found:
        assert frontier.chosen.distortion == allocation.predicted
        assert frontier.chosen in frontier.points, "4 and 6 bits are on the grid"
        assert all(a.bits < b.bits and a.distortion >= b.distortion for a, b in pairwise(frontier.points))
        for point in frontier.uniform:
            assert point.bits == pytest.approx(round(point.bits)) or frontier.side == "both"
            nearest = [p for p in frontier.points if p.bits <= point.bits + 1e-9]
            assert not nearest or min(p.distortion for p in nearest) <= point.distortion * (1 + 1e-9)
    assert {round(p.bits) for p in found[0].uniform} <= set(UNIFORM) | {7}


def test_budgets_that_cannot_be_met_are_left_out():
    budgets = Budgets(weight_bits=6, activation_bits=None)
    (found,) = frontiers(allocate_bits(measurement(widths=(4, 6), activation_bits=None), budgets), budgets)
    assert min(p.bits for p in found.points) >= 4
    assert {round(p.bits) for p in found.uniform} == {4, 6}
