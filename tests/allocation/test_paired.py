"""Pairs of widths against exhaustive search and a MILP solver: bound <= optimum <= what is found, within the budget."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from rdoq_onnx.allocation.paired import MOST_SHARED, Problem, Term, least_cost, solve_pairs

NEAR = 1e-9


def falling(rng, rows, widths):
    """Distortions that fall by about 6 dB a bit, noisy, some not allowed."""
    level = rng.lognormal(0, 1.5, (rows, 1))
    result = level * rng.uniform(2, 5, (rows, 1)) ** -np.arange(widths) * rng.lognormal(0, 0.3, (rows, widths))
    barred = rng.random(result.shape) < 0.1
    barred[np.arange(rows), rng.integers(widths, size=rows)] = False
    return np.where(barred, np.inf, result)


def random_problem(seed, layers, most_units, variables, widths):
    """Layers that read up to two activations, and products; bit operations, or any costs that rise, some refused."""
    rng = np.random.default_rng(seed)
    terms, first = [], 0
    for _ in range(layers):
        count = int(rng.integers(1, most_units, endpoint=True))
        read = tuple(rng.choice(variables, size=min(int(rng.integers(0, 3)), variables), replace=False).tolist())
        shape = (widths,) * len(read)
        work = float(rng.integers(1, 20))
        linear = work * np.arange(widths) * np.asarray(np.indices(shape).sum(axis=0) + 1.0)[..., None]
        jagged = np.sort(rng.random((*shape, widths)), axis=-1) * work
        cost = linear if rng.random() < 0.6 else jagged
        if rng.random() < 0.2:
            cost = np.where(rng.random(cost.shape) < 0.2, np.inf, cost)
        terms.append(Term(read, np.arange(first, first + count), cost, np.zeros(shape)))
        first += count
    if variables > 1 and rng.random() < 0.5:
        pair = tuple(rng.choice(variables, size=2, replace=False).tolist())
        fixed = np.outer(np.arange(widths), np.arange(widths)) * float(rng.integers(1, 9))
        terms.append(Term(pair, np.zeros(0, np.int64), np.zeros((widths, widths, widths)), fixed))
    return Problem(falling(rng, first, widths), falling(rng, variables, widths), tuple(terms))


def outcome(problem, units, variables):
    """(cost, distortion) of a choice, by definition."""
    cost = 0.0
    for term in problem.terms:
        at = tuple(variables[v] for v in term.variables)
        cost += float(term.fixed[at]) + sum(float(term.cost[(*at, units[u])]) for u in term.units.tolist())
    distortion = sum(problem.units[u, w] for u, w in enumerate(units))
    return cost, float(distortion + sum(problem.variables[v, a] for v, a in enumerate(variables)))


def best_and_range(problem, budget):
    """(least distortion within the budget, least and greatest finite cost), by trying every choice."""
    widths = range(problem.units.shape[1])
    best, costs = math.inf, []
    for units in itertools.product(widths, repeat=len(problem.units)):
        for variables in itertools.product(widths, repeat=len(problem.variables)):
            cost, distortion = outcome(problem, units, variables)
            if math.isfinite(cost) and math.isfinite(distortion):
                costs.append(cost)
                if cost <= budget:
                    best = min(best, distortion)
    return best, min(costs, default=math.inf), max(costs, default=math.inf)


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 2), st.floats(0, 1))
def test_exhaustive_search(seed, layers, variables, share):
    problem = random_problem(seed, layers, 2, variables, 3)
    _, least, most = best_and_range(problem, 0.0)
    assert least_cost(problem) == pytest.approx(least)
    if not math.isfinite(least):
        return
    budget = least + share * (most - least) + NEAR
    optimum, *_ = best_and_range(problem, budget)
    found = solve_pairs(problem, budget)
    cost, distortion = outcome(problem, found.units.tolist(), found.variables.tolist())
    assert cost <= budget * (1 + NEAR)
    assert (found.cost, found.distortion) == (pytest.approx(cost), pytest.approx(distortion))
    assert optimum * (1 - NEAR) <= found.distortion
    assert found.bound <= optimum * (1 + NEAR)
    assert 0 <= found.bound <= found.distortion


def linear_program(problem, budget):
    """Least distortion by scipy's MILP solver: a binary for each pair of a term's combination and a unit's width."""
    names, distortion, cost = {}, [], []

    def binary(key, d, c):
        names[key] = len(distortion)
        distortion.append(d)
        cost.append(c)

    for v, row in enumerate(problem.variables):
        for a in np.flatnonzero(np.isfinite(row)).tolist():
            binary(("v", v, a), row[a], 0.0)
    for k, term in enumerate(problem.terms):
        for at in itertools.product(*(np.flatnonzero(np.isfinite(problem.variables[v])) for v in term.variables)):
            if math.isfinite(term.fixed[at]):
                binary(("t", k, at), 0.0, float(term.fixed[at]))
            for u in term.units.tolist():
                for w in np.flatnonzero(np.isfinite(problem.units[u]) & np.isfinite(term.cost[at])).tolist():
                    binary(("u", u, k, at, w), problem.units[u, w], float(term.cost[(*at, w)]))
    rows, low = [], []

    def constraint(entries, least):
        row = np.zeros(len(distortion))
        for key, value in entries:
            row[names[key]] += value
        rows.append(row)
        low.append(least)

    for v in range(len(problem.variables)):
        constraint([(key, 1.0) for key in names if key[:2] == ("v", v)], 1.0)
    for k, term in enumerate(problem.terms):
        combinations = [key[2] for key in names if key[:2] == ("t", k)]
        constraint([(("t", k, at), 1.0) for at in combinations], 1.0)
        for position, v in enumerate(term.variables):
            for a in np.flatnonzero(np.isfinite(problem.variables[v])).tolist():
                own = [(("t", k, at), 1.0) for at in combinations if at[position] == a]
                constraint([*own, (("v", v, a), -1.0)], 0.0)
        for u in term.units.tolist():
            for at in combinations:
                own = [(key, 1.0) for key in names if key[:4] == ("u", u, k, at)]
                constraint([*own, (("t", k, at), -1.0)], 0.0)
    equal = LinearConstraint(np.array(rows), low, low)
    spent = LinearConstraint(np.array([cost]), -np.inf, budget)
    size = len(distortion)
    options = {"mip_rel_gap": 1e-9}
    return milp(
        np.array(distortion),
        constraints=[equal, spent],
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        options=options,
    ).fun


@pytest.mark.parametrize("seed", range(12))
def test_integer_programming_on_mid_sized_problems(seed):
    problem = random_problem(seed, 6, 8, 5, 4)
    least, free = least_cost(problem), solve_pairs(problem, 1e9)
    assert max(len(component.members) for component in problem.components) <= MOST_SHARED + 1
    budget = least + 0.4 * (free.cost - least)
    optimum = linear_program(problem, budget)
    found = solve_pairs(problem, budget)
    assert found.bound <= optimum * (1 + 1e-6)
    assert optimum * (1 - 1e-6) <= found.distortion <= 1.1 * optimum
    assert found.cost <= budget * (1 + NEAR)


def test_separate_layers_take_the_best_pair_each():
    """Without shared activations the search at a slope is over the pairs of each layer by itself."""
    rng = np.random.default_rng(3)
    widths = np.arange(9)
    terms = tuple(
        Term((k,), np.arange(4 * k, 4 * k + 4), np.outer(widths, widths) * float(k + 1), np.zeros(9)) for k in range(6)
    )
    problem = Problem(falling(rng, 24, 9), falling(rng, 6, 9), terms)
    assert [component.members for component in problem.components] == [(k,) for k in range(6)]
    slope, found = 1e-4, 0.0
    for k, term in enumerate(terms):
        pairs = [
            problem.variables[k, a] + np.min(problem.units[4 * k : 4 * k + 4] + slope * term.cost[a], axis=1).sum()
            for a in range(9)
        ]
        found += min(pairs)
    budget = solve_pairs(problem, 1e9).cost / 3
    assert found - slope * budget <= solve_pairs(problem, budget).bound * (1 + NEAR)


def test_more_budget_costs_more_and_distorts_less():
    problem = random_problem(5, 8, 20, 6, 9)
    least, free = least_cost(problem), solve_pairs(problem, 1e9)
    budgets = np.linspace(least, free.cost, 12)
    found = [solve_pairs(problem, budget) for budget in budgets]
    assert all(each.cost <= budget * (1 + NEAR) for each, budget in zip(found, budgets, strict=True))
    bounds = [each.bound for each in found]
    assert bounds == sorted(bounds, reverse=True)
    assert found[-1].distortion == pytest.approx(free.distortion)
