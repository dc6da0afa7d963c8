"""Budgets of a search: steps of bits on the side that moves, or shares of a cost, up to the budget that is given."""

import pytest

from rdoq_onnx.config import Config
from rdoq_onnx.model.cost_rows import Amount, parse_cost, preset
from rdoq_onnx.refinement.budget_grid import STEPS, Grid
from tests.allocation.test_costed import measurement
from tests.cost.test_tables import HEAD

BOPS = preset("bops")


def test_bits_of_the_side_that_moves():
    config = Config(sqnr=20.0, weight_bits=6.0, activation_bits=8.0, moved="weights")
    grid = Grid.of(measurement(), config)
    assert (grid.low, grid.high) == (16, 96)
    moved = grid.at(config.budgets, 40)
    assert (moved.weight_bits, moved.activation_bits, moved.budget) == (2.5, 8.0, None)
    assert grid.word(40) == "2.5 bits give"
    assert Grid.of(measurement(), Config(sqnr=20.0, moved="activations", activation_bits=5.0)).high == 80


@pytest.mark.parametrize(("budget", "high"), [(None, 128), (Amount(40, percent=True), 51), (Amount(24576), 64)])
def test_shares_of_8_bits_everywhere(budget, high):
    """Those of `test_costed` take 768 multiplications, 49,152 bit operations."""
    config = Config(sqnr=20.0, cost=BOPS, budget=budget)
    grid = Grid.of(measurement(), config)
    assert (grid.low, grid.high) == (1, high)
    assert grid.at(config.budgets, 32).budget == Amount(25, percent=True)
    assert grid.word(32) == "25 % of 8 bits everywhere give"


def test_a_file_that_does_not_price_8_bits():
    """The widths of least distortion cost the most that makes a difference."""
    rows = HEAD + ".*,0-3,*,1\n.*,4,*,5\n"
    cost = parse_cost(rows, "t.csv")
    config = Config(sqnr=20.0, cost=cost)
    grid = Grid.of(measurement(), config)
    assert (grid.high, grid.percent) == (STEPS, False)
    assert grid.at(config.budgets, STEPS).budget == Amount(15)
    assert grid.word(STEPS) == "100 % of the most cost give"
    assert Grid.of(measurement(), Config(sqnr=20.0, cost=cost, budget=Amount(7.5))).high == STEPS // 2
