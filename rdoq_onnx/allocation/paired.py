"""Choose widths within a budget that counts pairs of widths: of weights, and of the activation that they meet.

A unit u (a channel) costs c_u(w, a) at its width w, where a are the widths of the activations that its nodes read. At
slope λ,

    g(λ) = Σ_components min_a [ Σ_activations d(a) + Σ_units min_w (d_u(w) + λ c_u(w, a)) + λ f(a) ] - λ B
    bound = max_λ g(λ)  <=  optimum

Given a, each unit chooses by itself; activations that share a node form a component, whose widths are enumerated. An
activation that feeds one layer alone is a component of its own, so that each layer takes the best pair for itself.
f: what nodes without weights cost.

The dual is maximized by bisection of λ. On either side of it, the widths of the activations are kept and the units
solved for anew, then what is left of the budget is spent greedily on the steepest upgrades that fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.union_find import UnionFind

Float = NDArray[np.float64]
Integers = NDArray[np.int64]

MOST_SHARED = 4  # activations of a component, whose widths are enumerated
_GROWTH, _STEPS = 16.0, 64  # of λ while it is bracketed, and halvings of the bracket in log λ
_CLOSE = 1 + 1e-9  # ratio of the bracket's ends at which it is closed


@dataclass(frozen=True, eq=False)
class Term:
    """Units that pay alike, and activations whose widths they pay for.

    cost: of each unit, [A, ..., W], an axis for each of `variables`; inf where refused. fixed: of what has no units,
    [A, ...].
    """

    variables: tuple[int, ...]
    units: Integers
    cost: Float
    fixed: Float

    @property
    def combinations(self) -> int:
        return self.fixed.size


@dataclass(frozen=True, eq=False)
class Problem:
    """units: d of each at its widths, [U, W]; variables: of each activation, [V, A]; inf where not allowed."""

    units: Float
    variables: Float
    terms: tuple[Term, ...]

    @cached_property
    def components(self) -> tuple["_Component", ...]:
        """Activations that share terms, and their terms; one without activations for terms that have none."""
        sets = UnionFind()
        sets.new(len(self.variables))
        for term in self.terms:
            for other in term.variables[1:]:
                sets.unite(other, term.variables[0])
        groups: dict[int, list[int]] = {}
        for variable in range(len(self.variables)):
            groups.setdefault(sets.find(variable), []).append(variable)
        terms: dict[int, list[int]] = {}
        for k, term in enumerate(self.terms):
            terms.setdefault(sets.find(term.variables[0]) if term.variables else -1, []).append(k)
        found = [_Component.of(self, members, terms.get(root, [])) for root, members in groups.items()]
        return (*found, *([_Component.of(self, [], terms[-1])] if -1 in terms else []))


@dataclass(frozen=True, eq=False)
class _Component:
    """widths: all combinations of its activations' allowed widths, [P, members]; places: of each in a term, [P]."""

    members: tuple[int, ...]
    terms: tuple[int, ...]
    widths: Integers
    places: tuple[Integers, ...]

    @classmethod
    def of(cls, problem: Problem, members: Sequence[int], terms: Sequence[int]) -> "_Component":
        allowed = [np.flatnonzero(np.isfinite(problem.variables[m])) for m in members]
        grid = np.stack([g.ravel() for g in np.meshgrid(*allowed, indexing="ij")], axis=1) if members else None
        widths = np.zeros((1, 0), np.int64) if grid is None else grid
        column = {m: k for k, m in enumerate(members)}
        places = []
        for term in (problem.terms[k] for k in terms):
            index = tuple(widths[:, column[v]] for v in term.variables)
            shape = term.fixed.shape
            places.append(np.ravel_multi_index(index, shape) if index else np.zeros(len(widths), np.int64))
        return cls(tuple(members), tuple(terms), widths, tuple(places))


@dataclass(frozen=True, eq=False)
class PairedSolution:
    """A width for each unit and activation, as columns; bound: on the distortion of any choice within the budget."""

    units: Integers
    variables: Integers
    cost: float
    distortion: float
    bound: float = 0.0


def solve_pairs(problem: Problem, budget: float) -> PairedSolution:
    """Choose the widths of least distortion within `budget`, which must be `least_cost` or more."""
    free = _relaxed(problem, 0.0)
    if free.cost <= budget:
        return replace(free, bound=free.distortion)
    within, above, bound = _bracketed(problem, budget, free)
    tried = [_with_variables(problem, within, budget)]
    if (above.variables != within.variables).any():
        kept = np.arange(problem.variables.shape[1]) == above.variables[:, None]
        alone = replace(problem, variables=np.where(kept, problem.variables, np.inf))
        if least_cost(alone) <= budget:
            tried.append(_with_variables(problem, _bracketed(alone, budget, above)[0], budget))
    best = min(tried, key=lambda each: each.distortion)
    return replace(best, bound=min(bound, best.distortion))


def least_cost(problem: Problem) -> float:
    """Return the cost of the cheapest allowed choice; inf if nothing is allowed."""
    return _cheapest(problem).cost


def _bracketed(problem: Problem, budget: float, free: PairedSolution) -> tuple[PairedSolution, PairedSolution, float]:
    """Return the choices on either side of the λ of greatest dual, within and above the budget, and that dual."""
    slope = max(free.distortion, 1e-300) / max(budget, 1e-300)
    low, high, above, within, bound = 0.0, math.inf, free, _cheapest(problem), 0.0
    for _ in range(_STEPS):
        found = _relaxed(problem, slope)
        bound = max(bound, found.distortion + slope * (found.cost - budget))
        if found.cost <= budget:
            high, within = slope, found
        else:
            low, above = slope, found
        if high < low * _CLOSE:
            break
        slope = slope / _GROWTH if not low else slope * _GROWTH if high == math.inf else math.sqrt(low * high)
    return within, above, bound


def _with_variables(problem: Problem, start: PairedSolution, budget: float) -> PairedSolution:
    """Return `start` with what is left of the budget spent on the units."""
    variables = start.variables
    distortion, cost = _unit_points(problem, variables)
    fixed = sum(float(t.fixed[tuple(variables[list(t.variables)])]) for t in problem.terms)
    fixed_distortion = float(problem.variables[np.arange(len(variables)), variables].sum())
    choice, rows = _filled(distortion, cost, start.units, budget - fixed), np.arange(len(distortion))
    spent = float(cost[rows, choice].sum()) + fixed
    return PairedSolution(choice, variables, spent, float(distortion[rows, choice].sum()) + fixed_distortion)


def _unit_points(problem: Problem, variables: Integers) -> tuple[Float, Float]:
    """Return distortion and cost of each unit at each width, [U, W], where activations have these widths."""
    distortion, cost = problem.units.copy(), np.zeros(problem.units.shape)
    for term in problem.terms:
        own = term.cost[tuple(variables[list(term.variables)])]
        cost[term.units] += np.where(np.isfinite(own), own, 0.0)
        distortion[term.units] = np.where(np.isfinite(own), distortion[term.units], np.inf)
    return distortion, cost


def _filled(distortion: Float, cost: Float, choice: Integers, budget: float) -> Integers:
    """Take upgrades, the steepest in distortion per cost first, as long as one fits."""
    choice, rows = choice.copy(), np.arange(len(distortion))
    room = budget - float(cost[rows, choice].sum())
    while True:
        gain = distortion[rows, choice][:, None] - distortion
        extra = cost - cost[rows, choice][:, None]
        slope = np.where((gain > 0) & (extra <= room), gain / np.maximum(extra, 1e-300), 0.0)
        best = slope.argmax(axis=1)
        order = np.argsort(-slope[rows, best], kind="stable")
        order = order[slope[order, best[order]] > 0]
        taken = order[: max(int(np.searchsorted(np.cumsum(extra[order, best[order]]), room, side="right")), 0)]
        if not len(taken):
            return choice
        choice[taken] = best[taken]
        room = budget - float(cost[rows, choice].sum())


def _relaxed(problem: Problem, slope: float) -> PairedSolution:
    """Return the choice of least distortion + slope · cost, the cheaper one of equals."""
    units = np.zeros(len(problem.units), np.int64)
    variables = np.zeros(len(problem.variables), np.int64)
    distortion = cost = 0.0
    for component in problem.components:
        total = np.zeros(len(component.widths))
        for column, member in enumerate(component.members):
            total += problem.variables[member, component.widths[:, column]]
        for k, place in zip(component.terms, component.places, strict=True):
            total += _lagrangian(problem, problem.terms[k], slope, np.unique(place))[place]
        best = int(total.argmin())
        for column, member in enumerate(component.members):
            variables[member] = component.widths[best, column]
            distortion += float(problem.variables[member, variables[member]])
        for k, place in zip(component.terms, component.places, strict=True):
            term = problem.terms[k]
            own = term.cost.reshape(term.combinations, -1)[place[best]]
            points = problem.units[term.units]
            chosen = _weighed(points, own, slope).argmin(axis=1)
            units[term.units] = chosen
            distortion += float(points[np.arange(len(points)), chosen].sum())
            cost += float(own[chosen].sum() + term.fixed.ravel()[place[best]])
    return PairedSolution(units, variables, cost, distortion)


def _lagrangian(problem: Problem, term: Term, slope: float, combinations: Integers) -> Float:
    """Return Σ min_w (d + λ c) + λ f of a term at these combinations of widths."""
    result = _weighed(np.zeros(term.combinations), term.fixed.ravel(), slope)
    points, costs = problem.units[term.units], term.cost.reshape(term.combinations, -1)
    for k in combinations.tolist() if len(points) else ():
        result[k] += _weighed(points, costs[k], slope).min(axis=1).sum()
    return result


def _weighed(points: Float, cost: Float, slope: float) -> Float:
    """Return d + λ c; inf where refused."""
    allowed = np.isfinite(cost)
    return points + np.where(allowed, slope * np.where(allowed, cost, 0.0), np.inf)


def _cheapest(problem: Problem) -> PairedSolution:
    """Return the cheapest choice, whatever its distortion."""
    bare = replace(
        problem,
        units=np.where(np.isfinite(problem.units), 0.0, np.inf),
        variables=np.where(np.isfinite(problem.variables), 0.0, np.inf),
    )
    found = _relaxed(bare, 1.0)
    units = problem.units[np.arange(len(found.units)), found.units].sum()
    variables = problem.variables[np.arange(len(found.variables)), found.variables].sum()
    if not np.isfinite(found.distortion):
        return replace(found, cost=math.inf)
    return replace(found, distortion=float(units + variables))
