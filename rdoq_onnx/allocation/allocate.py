"""Choose one width per unit to minimize distortion within a bit budget.

Primal, over one width w(u) for each unit u, with distortion d and rate r (bits):

    min  sum_u d(u, w(u))   subject to   sum_u r(u, w(u)) <= B

Lagrangian dual; at slope lambda >= 0 each unit picks its own point, independently of all others:

    g(lambda) = sum_u min_w [d(u, w) + lambda * r(u, w)] - lambda * B
    bound     = max_lambda g(lambda)  <=  optimum

(Shoham & Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 1988;
Wang et al., "RDO-Q: Extremely fine-grained channel-wise quantization via rate-distortion optimization",
ECCV 2022.) As lambda falls from infinity, each unit walks down its lower convex hull, and all units
together take the hull segments in the order of their slopes, drop of distortion per bit. So the best
lambda is the slope of the first segment that no longer fits: with L bits left before it,
bound = distortion so far - lambda * L, and the distance to the optimum is less than that segment's drop.

**Fill.** The bits left are spent by the same greedy rule, on any wider point, on the hull or not:

    take the upgrade of greatest drop per bit; discard for good an upgrade that does not fit

Before the first misfit the upgrades taken are the hull segments in the order of their slopes. After it,
the points still affordable have hulls of their own, from the points reached: the same step on a smaller
problem (`_segments`, `_steepest`). Each round discards at least one cost; it usually takes a few rounds.

**More budget never gives more distortion.** Let F(s, R) be the drop that the rule reaches with R bits
from state s (points reached, upgrades not discarded), X its first upgrade in s, c its cost, p its drop
per bit. Below c bits the rule discards X, from c bits on it takes X; on either side F does not fall,
by induction, since s is a smaller state there. At R = c it has gained p * c. Below c, its whole gain
is a sum over units of upgrades from their points in s, each at p per bit or less (X was the greatest),
so p * (c - 1) at most. Hence F never falls, and the rule's choice depends on s and R alone.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.curves.curves import BLOCK, MAX_BITS, Curves, hull_slopes
from rdoq_onnx.errors import BudgetError

_SORT = 1 << 16  # this many segments or fewer are sorted, more are split first


@dataclass(frozen=True, eq=False)
class Solution:
    """One width per unit, and a bound on its distance from the optimum."""

    choice: NDArray[np.int64]  # [U] index into widths
    rate: int  # bits in total, <= the budget
    distortion: float  # sum of the chosen distortions
    bound: float  # dual value, a lower bound on the distortion of any choice within the budget
    slope: float  # lambda, distortion per bit, at which the dual is greatest; 0 where the budget is ample

    @property
    def gap(self) -> float:
        """Return (distortion - bound) / distortion; 0 is proven optimal."""
        return max(self.distortion - self.bound, 0.0) / max(self.distortion, np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class _Segments:
    """S edges of the units' hulls; those of one unit in order, cheapest end first."""

    unit: NDArray[np.int32]  # [S] index of the unit
    column: NDArray[np.int8]  # [S] index of the width at which the segment ends
    cost: NDArray[np.int64]  # [S] bits
    slope: NDArray[np.float64]  # [S] drop of distortion per bit, never rising within a unit


def solve(curves: Curves, budget: int) -> Solution:
    """Choose the width of each unit within a total budget of bits.

    The distortion never rises as the budget grows, and exceeds the optimum by less than the drop of one
    hull segment. Equal slopes are taken in a fixed order. The bound ignores points that no choice
    within the budget can use.

    Raises BudgetError if even the cheapest allowed widths exceed the budget.
    """
    if curves.tied is not None:
        merged, place = curves.merged()
        solution = solve(merged, budget)
        return replace(solution, choice=solution.choice[place])
    choice = np.isfinite(curves.distortion).argmax(axis=1)
    room = budget - _rate(curves, choice)
    if room < 0:
        raise BudgetError(_shortfall(curves, budget, budget - room))
    choice, room, slope, units = _step(curves, np.arange(choice.size), choice, room)
    bound = _distortion(curves, choice) - slope * room
    while units.size:
        choice, room, _, units = _step(curves, units, choice, room)
    distortion = _distortion(curves, choice)
    return Solution(choice, budget - room, distortion, min(max(bound, 0.0), distortion), slope)


def _step(
    curves: Curves, units: NDArray[np.int64], choice: NDArray[np.int64], room: int
) -> tuple[NDArray[np.int64], int, float, NDArray[np.int64]]:
    """Take segments in the order of their slopes, up to the first that does not fit.

    Returns the new choice, the bits left, the slope of that misfit (0 if all fit), and the units that
    may still have an affordable upgrade.
    """
    segments = _segments(curves, units, choice, room)
    taken, slope = _steepest(segments, room)
    choice = choice.copy()
    choice[segments.unit[taken]] = segments.column[taken]  # a unit's last segment is written last
    room -= int(segments.cost[taken].sum())
    rest = np.zeros(choice.size, np.bool_)
    rest[segments.unit] = slope > 0
    return choice, room, slope, np.flatnonzero(rest)


def _segments(curves: Curves, units: NDArray[np.int64], choice: NDArray[np.int64], room: int) -> _Segments:
    """Return the hull segments from the chosen points on, over all points affordable with `room` bits."""
    least = int(np.diff(curves.widths).min(initial=MAX_BITS))
    units = units[curves.elements[units] * least <= room]
    blocks = [
        _block_segments(curves, units[start : start + BLOCK], choice, room) for start in range(0, units.size, BLOCK)
    ]
    return _Segments(
        np.concatenate([np.zeros(0, np.int32), *(block.unit for block in blocks)]),
        np.concatenate([np.zeros(0, np.int8), *(block.column for block in blocks)]),
        np.concatenate([np.zeros(0, np.int64), *(block.cost for block in blocks)]),
        np.concatenate([np.zeros(0), *(block.slope for block in blocks)]),
    )


def _block_segments(curves: Curves, units: NDArray[np.int64], choice: NDArray[np.int64], room: int) -> _Segments:
    """Return the segments of one block of units."""
    now, widths = choice[units], curves.widths
    points = np.ascontiguousarray(curves.distortion[units].T)
    height = points[now, np.arange(units.size)]
    high = widths[now] + room // curves.elements[units]
    points[(widths[:, None] < widths[now]) | (widths[:, None] > high)] = np.inf
    live = np.flatnonzero((points < height).any(axis=0))
    units, now = units[live], now[live]
    slopes = hull_slopes(widths, points[:, live])
    slopes[now, np.arange(units.size)] = 0.0  # the first point of a hull ends no segment
    ends = slopes > 0
    gaps, last = np.empty(slopes.shape, np.int64), widths[now]
    for k, width in enumerate(widths):
        gaps[k] = width - last
        last[ends[k]] = width
    unit = np.broadcast_to(units.astype(np.int32), ends.shape)[ends]
    column = np.broadcast_to(np.arange(len(widths), dtype=np.int8)[:, None], ends.shape)[ends]
    elements = curves.elements[unit]
    return _Segments(unit, column, gaps[ends] * elements, slopes[ends] / elements)


def _steepest(segments: _Segments, room: int) -> tuple[NDArray[np.int64], float]:
    """Find the steepest segments that fit in `room` bits, up to the first that does not.

    This is the bisection on lambda: the segments still undecided are split at their (sampled) median
    slope until few enough are left to sort, so that the time is linear in the segments.

    Returns the indices of the segments, ascending, and the slope of the first misfit (0 if all fit).
    """
    slope, cost = segments.slope, segments.cost
    taken = np.zeros(slope.size, np.bool_)
    left = np.arange(slope.size)
    while left.size > _SORT:
        steep = slope > np.median(slope[:: left.size // 1024 + 1])
        if not steep.any():
            break
        spent = int(cost[steep].sum())
        if spent <= room:
            room -= spent
            taken[left[steep]] = True
            steep = ~steep
        left, slope, cost = left[steep], slope[steep], cost[steep]
    order = np.argsort(-slope, kind="stable")
    fit = int(np.searchsorted(np.cumsum(cost[order]), room, side="right"))
    taken[left[order[:fit]]] = True
    return np.flatnonzero(taken), float(slope[order[fit]]) if fit < order.size else 0.0


def _rate(curves: Curves, choice: NDArray[np.int64]) -> int:
    """Return the total bits of a choice."""
    return int(curves.spent(curves.widths[choice]).sum())


def _distortion(curves: Curves, choice: NDArray[np.int64]) -> float:
    """Return the sum of the chosen distortions, rounded once, so that the order of the units does not matter."""
    return math.fsum(np.take_along_axis(curves.distortion, choice[:, None], axis=1)[:, 0].tolist())


def _shortfall(curves: Curves, budget: int, least: int) -> str:
    """Word how far a budget is out of reach, in one line."""
    total = max(int(curves.elements.sum()), 1)
    return (
        f"the budget of {budget / total:.4g} bits on average ({budget} in total) cannot be met: "
        f"the narrowest allowed widths take {least / total:.4g} ({least} in total); "
        "ask for more bits or allow narrower widths"
    )
