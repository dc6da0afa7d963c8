"""The allocation against exhaustive search, a MILP solver, its own rule spelled out, and its promises."""

import importlib
import itertools
import math
import re
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from rdoq_onnx.allocation.allocate import solve
from rdoq_onnx.curves.curves import Curves, hull_slopes
from rdoq_onnx.errors import BudgetError
from tests import strategies as own

module = importlib.import_module("rdoq_onnx.allocation.allocate")

NEAR = 1e-9  # relative: the bound is a rounded sum


def affordable(curves, budget):
    """The curves without the points that leave too few bits for the other units' cheapest widths."""
    least, _ = own.rate_range(curves)
    cheapest = np.where(np.isfinite(curves.distortion), curves.rate, 2**62).min(axis=1, keepdims=True)
    return curves.restrict(curves.rate - cheapest <= budget - least)


def optimum(curves, budget):
    """Least distortion within the budget, by trying every choice."""
    rates, distortions = curves.rate.tolist(), curves.distortion.tolist()
    best = math.inf
    for choice in itertools.product(range(curves.widths.size), repeat=len(rates)):
        if sum(r[k] for r, k in zip(rates, choice, strict=True)) <= budget:
            best = min(best, math.fsum(d[k] for d, k in zip(distortions, choice, strict=True)))
    return best


def largest_drop(curves):
    """Largest drop of distortion along one edge of one unit's hull."""
    slopes = hull_slopes(curves.widths, curves.distortion.T).T
    drops = [0.0]
    for row, distortion in zip(slopes, curves.distortion, strict=True):
        drops.extend(-np.diff(distortion[row > 0]))
    return max(drops)


def dual(curves, budget, slope):
    """The Lagrangian dual at one slope, by definition."""
    return (curves.distortion + slope * curves.rate).min(axis=1).sum() - slope * budget


def greedy(curves, budget):
    """The rule of the module's docstring, word for word, one upgrade at a time."""
    rate, distortion = curves.rate, curves.distortion
    choice = np.isfinite(distortion).argmax(axis=1)
    units = np.arange(choice.size)
    room = budget - rate[units, choice].sum()
    struck = ~np.isfinite(distortion)
    while True:
        cost = rate - rate[units, choice][:, None]
        drop = distortion[units, choice][:, None] - distortion
        per_bit = np.where((cost > 0) & ~struck & (drop > 0), drop / np.maximum(cost, 1), 0.0)
        unit, column = np.unravel_index(per_bit.argmax(), per_bit.shape)
        if per_bit[unit, column] == 0:
            return choice
        if cost[unit, column] <= room:
            room -= cost[unit, column]
            choice[unit] = column
        else:
            struck[unit, column] = True


def check(curves, budget, solution):
    """What holds for every solution."""
    units = np.arange(solution.choice.size)
    assert solution.choice.dtype == np.int64
    assert solution.rate == curves.rate[units, solution.choice].sum() <= budget
    assert solution.distortion == math.fsum(curves.distortion[units, solution.choice])
    assert math.isfinite(solution.distortion)
    assert 0 <= solution.bound <= solution.distortion
    assert 0 <= solution.gap <= 1


@given(own.curves_and_budget(max_units=5, max_widths=4))
def test_against_exhaustive_search(problem):
    curves, budget = problem
    solution = solve(curves, budget)
    check(curves, budget, solution)
    best = optimum(curves, budget)
    assert solution.bound <= best * (1 + NEAR)
    assert best <= solution.distortion
    assert solution.distortion - best <= largest_drop(affordable(curves, budget)) * (1 + NEAR)


@settings(max_examples=8)
@given(own.curves_and_budget(min_units=60, max_units=150, max_widths=6, max_elements=500, ties=False))
def test_against_mixed_integer_programming(problem):
    curves, budget = problem
    solution = solve(curves, budget)
    check(curves, budget, solution)
    units, widths = curves.distortion.shape
    allowed = np.isfinite(curves.distortion).ravel()
    one_each = LinearConstraint(np.kron(np.eye(units), np.ones(widths)), 1, 1)
    within = LinearConstraint(curves.rate.reshape(1, -1), -np.inf, budget)
    scale = max(solution.distortion, 1e-300)
    result = milp(
        np.where(allowed, curves.distortion.ravel(), 0) / scale,
        integrality=np.ones(allowed.size),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=[one_each, within],
        options={"mip_rel_gap": 1e-6, "time_limit": 1.0},
    )
    assume(result.x is not None)
    # HiGHS takes what is within 1e-6 of an integer or a bound for one, each of many times.
    assert solution.bound <= scale * result.fun * (1 + 1e-5)
    assert solution.distortion >= scale * result.mip_dual_bound * (1 - 1e-5)
    drop = largest_drop(affordable(curves, budget))
    assert solution.distortion - scale * result.mip_dual_bound <= drop + scale * 1e-5


@given(own.curves_and_budget(max_units=30, max_widths=9))
def test_bound_is_the_greatest_dual_value(problem):
    curves, budget = problem
    solution = solve(curves, budget)
    curves = affordable(curves, budget)
    slopes = hull_slopes(curves.widths, curves.distortion.T) / curves.elements
    values = [dual(curves, budget, slope) for slope in [0.0, *slopes[np.isfinite(slopes)]]]
    scale = np.where(np.isfinite(curves.distortion), curves.distortion, 0).max(axis=1).sum()
    assert solution.bound == pytest.approx(max(values), rel=NEAR, abs=NEAR * scale)
    assert dual(curves, budget, solution.slope) == pytest.approx(max(values), rel=NEAR, abs=NEAR * scale)


@given(own.curves_and_budget(max_units=12, max_widths=7, ties=False))
def test_follows_the_greedy_rule(problem):
    np.testing.assert_array_equal(solve(*problem).choice, greedy(*problem))


@given(own.curves(max_units=6, max_widths=6))
def test_more_budget_never_gives_more_distortion(curves):
    least, most = own.rate_range(curves)
    budgets = range(least, most + 2, max((most - least) // 60, 1))
    solutions = [solve(curves, budget) for budget in budgets]
    for less, more in itertools.pairwise(solutions):
        assert more.distortion <= less.distortion


@given(own.curves_and_budget(max_units=30, max_widths=9, ties=False), st.randoms(use_true_random=False))
def test_order_of_the_units_does_not_matter(problem, random):
    curves, budget = problem
    order = list(range(curves.elements.size))
    random.shuffle(order)
    solution, permuted = solve(curves, budget), solve(curves.take(np.array(order)), budget)
    assert permuted.distortion == solution.distortion
    assert permuted.rate == solution.rate
    np.testing.assert_array_equal(permuted.choice, solution.choice[order])


@given(own.curves_and_budget(min_units=5, max_units=60, max_widths=9))
def test_splitting_and_blocks_change_nothing(problem):
    curves, budget = problem
    whole = solve(curves, budget)
    with mock.patch.object(module, "_SORT", 4):
        split = solve(curves, budget)
    np.testing.assert_array_equal(split.choice, whole.choice)
    assert split.slope == whole.slope
    with mock.patch.object(module, "BLOCK", 3):
        blocks = solve(curves, budget)
    check(curves, budget, blocks)
    assert blocks.slope == whole.slope


@given(own.curves(max_units=20, max_widths=9))
def test_extremes(curves):
    least, most = own.rate_range(curves)
    narrow, wide = solve(curves, least), solve(curves, most)
    assert narrow.rate == least
    assert narrow.gap == 0
    np.testing.assert_array_equal(narrow.choice, np.isfinite(curves.distortion).argmax(axis=1))
    assert wide.distortion == wide.bound == math.fsum(curves.distortion.min(axis=1))
    np.testing.assert_array_equal(wide.choice, curves.distortion.argmin(axis=1))
    assert solve(curves, wide.rate).distortion == wide.distortion
    with pytest.raises(BudgetError):
        solve(curves, least - 1)


def test_fill_takes_points_off_the_hull():
    curves = Curves(np.array([0, 1, 4]), np.array([1]), np.array([[8.0, 7.0, 0.0]]))
    assert solve(curves, 3).choice == [1]
    assert solve(curves, 4).choice == [2]


def test_fill_passes_over_what_does_not_fit():
    """Unit 0 is steeper but too large for the last bits; units 1 and 2 take them."""
    distortion = np.array([[100.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    curves = Curves(np.array([0, 1]), np.array([10, 3, 2]), distortion)
    np.testing.assert_array_equal(solve(curves, 9).choice, [0, 1, 1])
    np.testing.assert_array_equal(solve(curves, 12).choice, [1, 0, 1])


def test_budget_error_says_by_how_much():
    curves = Curves(np.array([2, 4]), np.array([10, 30]), np.array([[1.0, 0.5], [np.inf, 1.0]]))
    with pytest.raises(BudgetError) as caught:
        solve(curves, 100)
    message = str(caught.value)
    assert re.search(r"2\.5 bits on average \(100 in total\).*3\.5 \(140 in total\)", message)
    assert "\n" not in message
    assert solve(curves, 140).rate == 140


def test_no_units():
    solution = solve(Curves(np.arange(3), np.ones(0, int), np.zeros((0, 3))), 0)
    assert (solution.rate, solution.distortion, solution.bound, solution.gap) == (0, 0.0, 0.0, 0.0)


def test_large_case_splits_and_closes_the_gap():
    """Enough segments to be split, not only sorted."""
    rng = np.random.default_rng(0)
    distortion = rng.random((30_000, 1)) * 4.0 ** -np.arange(9) * rng.lognormal(0, 0.2, (30_000, 9))
    curves = Curves(np.arange(9), rng.integers(1, 4000, 30_000), distortion)
    budget = 3 * int(curves.elements.sum())
    solution = solve(curves, budget)
    check(curves, budget, solution)
    assert budget - solution.rate < 10
    assert solution.gap < 1e-6


def test_equal_slopes_are_taken_in_the_order_of_the_units():
    curves = Curves(np.array([0, 1]), np.ones(1000, int), np.tile([1.0, 0.0], (1000, 1)))
    np.testing.assert_array_equal(solve(curves, 400).choice, np.arange(1000) < 400)
