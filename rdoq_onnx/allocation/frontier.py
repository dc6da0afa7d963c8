"""Trace the rate-distortion frontier of a whole network by allocating its curves at a grid of budgets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.config import Budgets, Config, Side
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError
from rdoq_onnx.model.cost_rows import Amount

GRID = np.arange(1, 8.01, 0.25)  # average bits
UNIFORM = (2, 3, 4, 6, 8)
SHARES = (10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)  # percent of a cost

Settings = TypeVar("Settings", Budgets, Config)


@dataclass(frozen=True)
class Point:
    """Average bits, or a cost, and the predicted distortion of the whole network."""

    bits: float
    distortion: float


@dataclass(frozen=True)
class Frontier:
    """Predicted distortion over the budget of one side (or one budget for both), with all else fixed; or over a cost.

    points: mixed widths of least distortion. uniform: one width for the whole side, or one pair of them. chosen: this
    run's allocation. unit: that of the cost; None for average bits.
    """

    side: Side
    points: tuple[Point, ...]
    uniform: tuple[Point, ...]
    chosen: Point
    unit: str | None = None


def frontiers(allocation: Allocation, budgets: Budgets) -> tuple[Frontier, ...]:
    """Trace a frontier for each budget of `budgets`, and for its cost."""
    cost = () if budgets.cost is None else (cost_frontier(allocation, budgets),)
    return cost if budgets.budget is not None else (*cost, *_bit_frontiers(allocation, budgets))


def cost_frontier(allocation: Allocation, budgets: Budgets) -> Frontier:
    """Trace the least distortion over `budgets.cost`, up to what 8 bits everywhere cost."""
    if budgets.cost is None:
        raise ValueError("no cost")
    pricing = Pricing(allocation.measurement, budgets.cost)
    free = replace(budgets, joint=False, size=None)
    chosen = Point(pricing.total(allocation), allocation.predicted)
    whole = chosen.bits if pricing.at_8_bits is None else pricing.at_8_bits

    def at(share: float, allocate: Callable[[Measurement, Budgets], Allocation | None]) -> Point | None:
        if not whole:
            return None
        try:
            result = allocate(allocation.measurement, replace(free, budget=Amount(share * whole / 100)))
        except BudgetError:
            return None
        return None if result is None else Point(pricing.total(result), result.predicted)

    points = [at(share, allocate_bits) for share in SHARES]
    uniform = [at(share, uniform_bits) for share in SHARES[::3]]
    return Frontier("both", _distinct(points), _distinct(uniform), chosen, budgets.cost.unit)


def _bit_frontiers(allocation: Allocation, budgets: Budgets) -> tuple[Frontier, ...]:
    if allocation.activation_average is None:
        return (_frontier(allocation, budgets, "weights"),)
    if budgets.joint:
        return (_frontier(allocation, budgets, "both"),)
    return _frontier(allocation, budgets, "weights"), _frontier(allocation, budgets, "activations")


def _frontier(allocation: Allocation, budgets: Budgets, side: Side) -> Frontier:
    measurement = allocation.measurement

    def at(bits: float, allocate: Callable[[Measurement, Budgets], Allocation | None]) -> Point | None:
        try:
            result = allocate(measurement, with_budget(budgets, side, bits))
        except BudgetError:
            return None
        return None if result is None else Point(average(result, side), result.predicted)

    points = [at(float(b), allocate_bits) for b in GRID]
    uniform = [at(b, lambda measured, each: uniform_bits(measured, each, side)) for b in UNIFORM]
    return Frontier(side, _distinct(points), _distinct(uniform), Point(average(allocation, side), allocation.predicted))


def with_budget(settings: Settings, side: Side, bits: float) -> Settings:
    """Replace the budget of `side` in `settings`, and that of a cost by bits."""
    return replace(
        settings,
        budget=None,
        size=settings.size if side == "activations" else None,
        weight_bits=settings.weight_bits if side == "activations" else bits,
        activation_bits=settings.activation_bits if side == "weights" else bits,
    )


def average(allocation: Allocation, side: Side) -> float:
    """Return the bits per element of one side, or of both together."""
    if side == "weights":
        return allocation.weight_average
    if side == "activations":
        return allocation.activation_average or 0.0
    return allocation.joint_average


def _distinct(points: list[Point | None]) -> tuple[Point, ...]:
    return tuple(dict.fromkeys(p for p in points if p is not None))
