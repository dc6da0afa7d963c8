"""Trace the rate-distortion frontier of a whole network by allocating its curves at a grid of budgets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.config import Budgets, Config, Side
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError

GRID = np.arange(1, 8.01, 0.25)  # average bits
UNIFORM = (2, 3, 4, 6, 8)

Settings = TypeVar("Settings", Budgets, Config)


@dataclass(frozen=True)
class Point:
    """Average bits, and the predicted distortion of the whole network."""

    bits: float
    distortion: float


@dataclass(frozen=True)
class Frontier:
    """Predicted distortion over the budget of one side (or one budget for both), with all else fixed.

    points: mixed widths of least distortion. uniform: one width for the whole side. chosen: this run's allocation.
    """

    side: Side
    points: tuple[Point, ...]
    uniform: tuple[Point, ...]
    chosen: Point


def frontiers(allocation: Allocation, budgets: Budgets) -> tuple[Frontier, ...]:
    """Trace a frontier for each budget of `budgets`."""
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
    """Replace the budget of `side` in `settings`."""
    return replace(
        settings,
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
