"""Rate-distortion curves of weight channels and activations, and their lower convex hulls.

A *unit* u is one weight channel or one activation. At b bits it costs r = b * elements(u) bits of the budget and
distorts the network's output by d(u, b), measured or estimated. A Lagrangian allocation can only reach points on the
lower convex hull of {(r, d)} (Shoham & Gersho 1988), and only the decreasing part of the hull is useful. The elements
scale a unit's whole rate axis, so the hull over bits is the hull over rate.
"""

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 16
BLOCK = 1 << 12  # units processed at once, so that W rows of them stay in the cache


@dataclass(frozen=True, eq=False)
class Curves:
    """Rate-distortion points of U units (weight channels or activations) at W candidate widths.

    Raises ValueError if shapes disagree, widths do not ascend strictly within 0..16, elements are below 1, a distortion
    is NaN or negative, or a unit has no allowed width.
    """

    widths: NDArray[np.int64]  # [W] bits, strictly ascending, within 0..16
    elements: NDArray[np.int64]  # [U] elements that one unit spends its bits on, >= 1
    distortion: NDArray[np.float64]  # [U, W] >= 0; inf where the width is not allowed for that unit
    overhead: NDArray[np.int64] | None = None  # [U] bits that a unit takes at any width, of scales; None for 0
    tied: NDArray[np.int64] | None = None  # [U] units of the same number take the same width; None for all apart

    def __post_init__(self) -> None:
        """Reject input that the solver cannot handle."""
        _check_axes(self.widths, self.elements, self.distortion)
        _check_distortion(self.distortion)

    @property
    def rate(self) -> NDArray[np.int64]:
        """Bits of each unit at each width, [U, W]."""
        return self.spent(self.widths[None, :].repeat(len(self.elements), axis=0))

    def spent(self, bits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bits of each unit at the width `bits`, [U] or [U, N]."""
        each: NDArray[np.int64] = (bits.T * self.elements).T
        return each if self.overhead is None else (each.T + self.overhead).T

    def restrict(self, mask: NDArray[np.bool_]) -> "Curves":
        """Return these curves with the widths where mask [U, W] is False disallowed (inf)."""
        shape = self.distortion.shape
        if mask.shape != shape or mask.dtype != np.bool_:
            raise ValueError(f"mask is {mask.dtype} of shape {mask.shape}, must be bool of shape {shape}")
        return replace(self, distortion=np.where(mask, self.distortion, np.inf))

    def take(self, rows: NDArray[np.int64]) -> "Curves":
        """Return the curves of the units with these indices, in this order."""
        overhead, tied = (None if v is None else v[rows] for v in (self.overhead, self.tied))
        return Curves(self.widths, self.elements[rows], self.distortion[rows], overhead, tied)

    def merged(self) -> tuple["Curves", NDArray[np.int64]]:
        """Return the curves with those of tied units summed, and the row there of each unit."""
        if self.tied is None:
            return self, np.arange(len(self.elements))
        _, first, place = np.unique(self.tied, return_index=True, return_inverse=True)
        shape = len(first), len(self.widths)
        elements, distortion = np.zeros(len(first), np.int64), np.zeros(shape)
        np.add.at(elements, place, self.elements)
        np.add.at(distortion, place, self.distortion)
        overhead = None
        if self.overhead is not None:
            overhead = np.zeros(len(first), np.int64)
            np.add.at(overhead, place, self.overhead)
        return Curves(self.widths, elements, distortion, overhead), place


def lower_hull(curves: Curves) -> NDArray[np.bool_]:
    """Mark the points on the decreasing part of each unit's lower convex hull of (rate, distortion).

    The hull starts at the unit's cheapest allowed width and ends at its cheapest width of least distortion. Points
    above it are omitted; points on an edge are kept, for smaller steps.

    Returns a bool array [U, W].
    """
    hull = np.empty(curves.distortion.shape, np.bool_)
    for start in range(0, curves.elements.size, BLOCK):
        block = slice(start, start + BLOCK)
        hull[block] = hull_slopes(curves.widths, np.ascontiguousarray(curves.distortion[block].T)).T > 0
    return hull


def hull_slopes(widths: NDArray[np.int64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gift-wrap the hulls of `lower_hull` from left to right, all units at once.

    Takes the distortions as [W, U], one contiguous row per width, inf where not allowed; fastest for at most BLOCK
    units.

    Returns [W, U]: the drop of distortion per bit of width along the hull edge that ends at the point, never rising
    along a hull; inf at the first point of a hull, 0 at points above it.
    """
    slopes = np.zeros(points.shape)
    slopes[np.isfinite(points).argmax(axis=0), np.arange(points.shape[1])] = np.inf
    with np.errstate(invalid="ignore"):  # inf - inf, in columns whose point i is not on the hull
        for i in range(len(widths) - 1):
            bits = (widths - widths[i]).tolist()
            descents = {k: (points[i] - points[k]) / bits[k] for k in range(i + 1, len(bits))}
            steepest = reduce(np.maximum, descents.values())
            on_hull = (slopes[i] > 0) & (steepest > 0)
            # The minimum keeps float rounding from raising the slope at three points in line.
            edge = np.minimum(steepest, slopes[i])
            for k, descent in descents.items():
                np.copyto(slopes[k], edge, where=on_hull & (descent == steepest))
    return slopes


def _check_axes(widths: NDArray[np.int64], elements: NDArray[np.int64], distortion: NDArray[np.float64]) -> None:
    """Raise ValueError unless widths, elements and the shape of the distortions fit together."""
    if widths.ndim != 1 or widths.dtype != np.int64 or widths.size == 0:
        raise ValueError(f"widths must be one or more int64, got {widths.dtype} {widths.shape}")
    if widths[0] < 0 or widths[-1] > MAX_BITS or not (np.diff(widths) > 0).all():
        raise ValueError(f"widths must ascend strictly within 0..{MAX_BITS}, got {widths.tolist()}")
    if elements.ndim != 1 or elements.dtype != np.int64:
        raise ValueError(f"elements must be a vector of int64, got {elements.dtype} {elements.shape}")
    if not (elements >= 1).all():
        raise ValueError(f"elements of unit {int((elements < 1).argmax())} are below 1")
    if distortion.shape != (elements.size, widths.size):
        raise ValueError(f"distortion has shape {distortion.shape}, must be {(elements.size, widths.size)}")


def _check_distortion(distortion: NDArray[np.float64]) -> None:
    """Raise ValueError at the first distortion that is NaN or negative, or unit without a finite one."""
    if distortion.dtype != np.float64:
        raise ValueError(f"distortion must be float64, got {distortion.dtype}")
    wrong = ~(distortion >= 0)
    if wrong.any():
        unit, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"distortion of unit {unit} at width index {column} is {distortion[unit, column]}")
    stuck = ~np.isfinite(distortion).any(axis=1)
    if stuck.any():
        raise ValueError(f"unit {int(stuck.argmax())} has no allowed width: all of its distortions are inf")
