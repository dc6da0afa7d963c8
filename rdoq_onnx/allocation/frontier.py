"""The rate-distortion frontier of a whole network: its curves allocated at a grid of budgets."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.config import Config, Side
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError

GRID = np.arange(1, 8.01, 0.25)  # bits on average
UNIFORM = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Point:
    """Bits on average, and the predicted distortion of the whole network."""

    bits: float
    distortion: float


@dataclass(frozen=True)
class Frontier:
    """What a budget buys, as the budget of one side (or one budget for both) moves and all else stays.

    points: widths of least distortion. uniform: one width for all of that side. chosen: this run's allocation.
    """

    side: Side
    points: tuple[Point, ...]
    uniform: tuple[Point, ...]
    chosen: Point


def frontiers(allocation: Allocation, config: Config) -> tuple[Frontier, ...]:
    """A frontier for each budget of `config`."""
    if allocation.activation_average is None:
        return (_frontier(allocation, config, "weights"),)
    if config.joint:
        return (_frontier(allocation, config, "both"),)
    return _frontier(allocation, config, "weights"), _frontier(allocation, config, "activations")


def _frontier(allocation: Allocation, config: Config, side: Side) -> Frontier:
    measurement = allocation.measurement

    def at(bits: float, find: Callable[[Measurement, Config], Allocation | None]) -> Point | None:
        try:
            found = find(measurement, with_budget(config, side, bits))
        except BudgetError:
            return None
        return None if found is None else Point(average(found, side), found.predicted)

    points = [at(float(b), allocate_bits) for b in GRID]
    uniform = [at(b, lambda m, c: uniform_bits(m, c, side)) for b in UNIFORM]
    return Frontier(
        side, _distinct(points), _distinct(uniform), Point(average(allocation, side), allocation.predicted)
    )


def with_budget(config: Config, side: Side, bits: float) -> Config:
    """`config` with another budget for `side`."""
    return replace(
        config,
        size=config.size if side == "activations" else None,
        weight_bits=config.weight_bits if side == "activations" else bits,
        activation_bits=config.activation_bits if side == "weights" else bits,
    )


def average(allocation: Allocation, side: Side) -> float:
    """Bits per element of one side, or of both together."""
    if side == "weights":
        return allocation.weight_average
    if side == "activations":
        return allocation.activation_average or 0.0
    return allocation.joint_average


def _distinct(points: list[Point | None]) -> tuple[Point, ...]:
    return tuple(dict.fromkeys(p for p in points if p is not None))
