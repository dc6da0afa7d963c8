"""Budgets of a cost on a network: never exceeded, bounded, the same bytes for the same rows, pins and limits held."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdoq_onnx.allocation.budget import allocate_bits, allocate_near, uniform_bits
from rdoq_onnx.allocation.costed import Pricing, _tied
from rdoq_onnx.allocation.frontier import cost_frontier, frontiers
from rdoq_onnx.config import Budgets
from rdoq_onnx.cost.tables import node_costs
from rdoq_onnx.cost.template import template
from rdoq_onnx.errors import BudgetError, ConfigError
from rdoq_onnx.model.cost_rows import Amount, parse_cost, preset
from tests.allocation import test_budget
from tests.cost.test_tables import HEAD, SIZES

BOPS = preset("bops")
MACS = (192, 256, 320)


def measurement(seed=0, **settings):
    return replace(test_budget.measurement(seed, **settings), observation=SimpleNamespace(sizes=SIZES))


def percent(value, cost=BOPS, **more):
    return Budgets(cost=cost, budget=Amount(value, percent=True), **more)


def bops(allocation):
    """Bit operations by definition."""
    x, a1, _, r = allocation.activation_bits
    means = (float(bits.mean()) for bits in allocation.layer_bits)
    return sum(work * w * a for work, w, a in zip(MACS, means, (x, a1, r), strict=True))


@given(st.integers(0, 99), st.floats(2, 100))
def test_never_over_the_budget(seed, share):
    measured = measurement(seed)
    allocation = allocate_bits(measured, percent(share))
    whole = 64 * sum(MACS)
    assert Pricing(measured, BOPS).at_8_bits == whole
    spent = Pricing(measured, BOPS).total(allocation)
    assert spent == pytest.approx(bops(allocation))
    assert spent <= share / 100 * whole * (1 + 1e-9)
    assert allocation.activation_bits[2] == 8, "an extra 8-bit tensor"
    assert 0 <= allocation.bound <= allocation.predicted
    chosen = measured.curves.distortion[np.arange(17), allocation.bits]
    assert allocation.predicted == pytest.approx(chosen.sum())


def test_nothing_within_the_bound():
    """By exhaustive search over the activations, with the units' own Lagrangian bound at many slopes."""
    measured, share = measurement(4), 30
    allocation = allocate_bits(measured, percent(share))
    budget, widths = share / 100 * 64 * sum(MACS), np.arange(9)
    rows = (range(4), range(4, 8), range(8, 13))
    best = np.inf
    for a in itertools.product(range(1, 9), repeat=3):
        own = measured.curves.distortion[[13, 14, 16], a].sum() + measured.curves.distortion[15, 8]
        duals = [
            sum(
                (measured.curves.distortion[u] + slope * work * widths * bits / len(units)).min()
                for units, work, bits in zip(rows, MACS, a, strict=True)
                for u in units
            )
            - slope * budget
            for slope in np.geomspace(1e-9, 1, 200)
        ]
        best = min(best, own + max(duals))
    assert best <= allocation.predicted
    assert allocation.bound <= best * (1 + 1e-9)
    assert allocation.gap < 0.05


def test_rows_of_a_file_are_worth_what_the_preset_is():
    measured = measurement(1, widths=(0, *range(2, 8)))
    read = parse_cost(template(measured.network, SIZES, BOPS), "t.csv", interpolated=True)
    one, other = (allocate_bits(measured, percent(40, cost)) for cost in (BOPS, read))
    assert one.bits.tolist() == other.bits.tolist()


def test_widths_without_a_row_are_not_chosen():
    cost = parse_cost(f"{HEAD}.*,4,8,4\n.*,2,8,2\n.*,2,4,1\nthird,*,*,3\n", "t.csv")
    allocation = allocate_bits(measurement(2), Budgets(cost=cost, budget=Amount(9)))
    assert set(np.concatenate(allocation.layer_bits[:2]).tolist()) <= {2, 4}
    assert set(allocation.activation_bits[:2]) <= {4, 8}
    assert Pricing(measurement(2), cost).total(allocation) <= 9
    narrow = parse_cost(f"{HEAD}.*,8,8,4\n", "t.csv")
    with pytest.raises(BudgetError, match="have no widths with a row in common"):
        allocate_bits(measurement(2), Budgets(cost=narrow, budget=Amount(99)))
    with pytest.raises(ConfigError, match="percentages are of 8 bits, at which some layers have no row"):
        allocate_bits(measurement(2), percent(50, cost))


def test_a_budget_of_bytes_is_that_of_size():
    measured = measurement(3)
    bytes_of_8_bits = 48
    for budget in (Amount(50, percent=True), Amount(bytes_of_8_bits / 2)):
        found = allocate_bits(measured, Budgets(cost=preset("size"), budget=budget))
        known = allocate_bits(measured, Budgets(size=bytes_of_8_bits // 2, activation_bits=8))
        assert found.bits.tolist() == known.bits.tolist()
        assert found.gap == known.gap
    assert Pricing(measured, preset("size")).total(found) == found.weight_payload / 8 <= 24


def test_pins_weighed_rows_and_near_widths():
    measured = measurement(5)
    budgets = percent(40, pins=(("second", 6), ("x", 5)))
    allocation = allocate_bits(measured, budgets)
    assert set(allocation.layer_bits[1].tolist()) == {6}
    assert allocation.activation_bits[0] == 5
    weigh = np.ones(17)
    weigh[:4] = 50
    weighed = allocate_bits(measured, budgets, weigh, allocation.bound)
    assert weighed.layer_bits[0].sum() > allocation.layer_bits[0].sum()
    assert weighed.predicted >= allocation.predicted
    assert allocate_bits(measured, budgets, weigh).bound == pytest.approx(allocation.bound)
    uniform = uniform_bits(measured, budgets)
    near = allocate_near(uniform, budgets, 1)
    assert np.abs(near.bits - uniform.bits).max() <= 1
    assert allocation.predicted <= near.predicted <= uniform.predicted
    assert max(map(bops, (weighed, uniform, near))) <= 0.4 * 64 * sum(MACS)
    assert len(set(uniform.layer_bits[0].tolist())) == 1


def test_uniform_widths_are_the_best_pair_within_the_budget():
    measured = measurement(6)
    uniform = uniform_bits(measured, percent(50))
    rows = measured.curves.distortion
    feasible = [(w, a) for w in range(1, 8) for a in range(1, 9) if w * a <= 32]
    sums = [rows[:13, w].sum() + rows[[13, 14, 16], a].sum() + rows[15, 8] for w, a in feasible]
    assert uniform.predicted == pytest.approx(min(sums))
    assert uniform_bits(measured, percent(0.1)) is None


def test_a_budget_out_of_reach_names_the_nearest():
    with pytest.raises(BudgetError, match=r"--budget 100 cannot be met: the cheapest .* cost 1536, 3.12 % of 8 bits"):
        allocate_bits(measurement(widths=(2, 4)), Budgets(cost=BOPS, budget=Amount(100)))


def test_activations_in_float():
    measured = measurement(activation_bits=None)
    allocation = allocate_bits(measured, percent(50, activation_bits=None))
    assert Pricing(measured, BOPS).at_8_bits == 256 * sum(MACS)
    assert allocation.activation_average is None
    assert Pricing(measured, BOPS).total(allocation) <= 128 * sum(MACS)


def test_frontier_falls_and_holds_the_run():
    budgets = percent(40)
    allocation = allocate_bits(measurement(7), budgets)
    found = cost_frontier(allocation, budgets)
    costs, distortions = zip(*((p.bits, p.distortion) for p in found.points), strict=True)
    assert list(costs) == sorted(costs)
    assert list(distortions) == sorted(distortions, reverse=True)
    assert found.chosen in found.points
    assert found.unit == "bit operations"
    assert [f.unit for f in frontiers(allocation, budgets)] == ["bit operations"]
    assert [f.unit for f in frontiers(allocation, replace(budgets, budget=None))] == ["bit operations", None, None]


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(20, 60))
def test_the_layer_limit_holds_within_a_cost(seed, limit):
    measured = measurement(seed)
    allocation = allocate_bits(measured, percent(60, layer_limit=limit // 8))
    assert all(int(bits.sum()) * k <= limit // 8 * 8 for bits, k in zip(allocation.layer_bits, (3, 4, 4), strict=True))
    assert bops(allocation) <= 0.6 * 64 * sum(MACS)


def test_many_shared_activations_take_one_width():
    assert _tied(3, [(0, 1)]) == [0, 1, 2]
    assert len(set(_tied(4, [(0, 1, 2)]))) == 2
    assert len(set(_tied(6, [(0, 1), (1, 2), (2, 3), (3, 4)]))) == 2


def test_nodes_that_share_a_weight_pay_each():
    measured = measurement(8)
    pricing = Pricing(measured, BOPS)
    spent = pricing.spent(allocate_bits(measured, percent(50)).bits)
    assert list(spent) == [n.node for n in node_costs(measured.network, SIZES, BOPS)]
