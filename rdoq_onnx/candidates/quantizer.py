"""Scales and rounding of channels and activations at each width, in numpy only.

Weights (one scale s per channel, zero point 0, so that the emitted DequantizeLinear is s·q):

    q = clip(round(w / s), l, l + 2^b - 1),    (s, l) = argmin ‖w - s·q‖²

The window of 2^b integers starts at l = -2^(b-1), or at -2^(b-1) + 1 if the heavier tail is positive. Zero need not lie
in its middle, but is always one of its integers, as kernels require.

A row that lies on a grid already (model/grid.py) keeps it wherever the window holds its integers.

Activations (one scale and zero point per tensor, unsigned integers):

    q = clip(round(a / s) + z, 0, 2^b - 1),    â = s·(q - z)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import WeightCodes, halved, stored
from rdoq_onnx.model.grid import Grid

FloatArray = NDArray[np.floating[Any]]

# Shares of a channel's largest magnitude that the integer range may cover. Few bits gain from more clipping; above 1
# the outermost integer stays unused, which suits channels with few distinct values.
_RANGE_SHARES = np.concatenate([np.geomspace(0.12, 0.7, 8, endpoint=False), np.linspace(0.7, 1.05, 8), [1.2, 1.5, 2.0]])
# Of a block's: what clips few weights spares few steps.
_BLOCK_SHARES = np.linspace(0.35, 1.05, 10)
_BLOCK = 1 << 15  # weights times trials rounded at once, to stay in the cache
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class _Search:
    """How scales are searched: shares of the range, and what rounds scales to those that a file holds."""

    shares: NDArray[np.float64]
    store: Callable[[FloatArray], NDArray[np.float64]]


_CHANNELS, _BLOCKS = _Search(_RANGE_SHARES, stored), _Search(_BLOCK_SHARES, halved)


def quantize_rows(
    rows: FloatArray,
    bits: int,
    limit: int,
    least_scale: NDArray[np.float64] | None = None,
    importance: FloatArray | None = None,
    grid: Grid | None = None,
) -> WeightCodes:
    """Round each row of `rows` [units, K] to `bits` bits at the scale of least squared error.

    limit: bound on the integers' magnitude. least_scale [units]: lower bound on scales. importance [units, K]: factor
    of each weight's squared error, 1 by default. grid: of the rows, if they may keep it.
    At 0 bits every integer is 0; the scale then has no meaning but is still valid for kernels.
    """
    rows = rows.astype(np.float64)
    importance = np.ones((1, 1)) if importance is None else importance
    floor = scale_floor(rows, least_scale)
    peak = np.abs(rows).max(axis=1)
    if bits == 0:
        scales = np.maximum(np.maximum(peak / limit, floor), np.median(peak) / limit)
        return WeightCodes(np.zeros(rows.shape, np.int8), stored(scales).astype(np.float32))
    integers, scales = _searched(rows, importance, (*window(rows, bits, limit), floor), _CHANNELS)
    codes = WeightCodes(integers, scales.astype(np.float32))
    return codes if grid is None else on_grid(codes, grid, bits, limit, floor)


def quantize_blocks(
    rows: FloatArray, bits: int, limit: int, size: int, importance: FloatArray | None = None
) -> WeightCodes:
    """Round as `quantize_rows` does, with a scale for each block of `size` consecutive weights of a row.

    A scale is negative where the heavier tail is positive, which turns the window: all blocks then have the same. With
    one bit, which leaves the weights of the other sign without a level, the heavier side has more energy.
    """
    blocks = rows.astype(np.float64).reshape(-1, size)
    shape = len(rows), rows.shape[1] // size
    if bits == 0:
        return WeightCodes(np.zeros(rows.shape, np.int8), np.ones(shape, np.float32))
    importance = np.ones((1, 1)) if importance is None else importance.reshape(-1, size)
    sides = [np.square(np.maximum(s * blocks, 0)) for s in (1, -1)]
    above, below = ((importance * s).sum(axis=1) if bits == 1 else s.max(axis=1) for s in sides)
    signs = np.where(above > below, -1.0, 1.0)
    low, high = (np.full(len(blocks), bound) for bound in block_window(bits, limit))
    blocks *= signs[:, None]
    integers, scales = _searched(blocks, importance, (low, high, scale_floor(blocks, None)), _BLOCKS)
    return WeightCodes(integers.reshape(rows.shape), (signs * scales).reshape(shape).astype(np.float32))


def _searched(
    rows: FloatArray, importance: FloatArray, bounds: tuple[FloatArray, FloatArray, FloatArray], search: _Search
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Return integers and scale of each row, part by part; bounds: (low, high, least scale) [R]."""
    integers, scales = np.empty(rows.shape, np.int8), np.empty(len(rows))
    peak, importance = np.abs(rows).max(axis=1), np.broadcast_to(importance, rows.shape)
    size = max(1, _BLOCK // (len(search.shares) * max(rows.shape[1], 1)))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        low, high, floor = (bound[part, None] for bound in bounds)
        result = _least_error(rows[part], peak[part, None], importance[part], (low, high, floor), search)
        integers[part], scales[part] = result
    return integers, scales


def on_grid(codes: WeightCodes, grid: Grid, bits: int, limit: int, floor: NDArray[np.float64]) -> WeightCodes:
    """Replace the rows of `codes` whose grid `bits` bits hold, which costs nothing, at full precision of the scale."""
    fits = grid.fits(bits, limit) & (grid.codes.scales >= floor)
    return codes.replaced(grid.codes, fits) if fits.any() else codes


def _least_error(
    rows: FloatArray,
    peak: FloatArray,
    importance: FloatArray,
    bounds: tuple[FloatArray, FloatArray, FloatArray],
    search: _Search,
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Return integers and scale of each row at the best range share; bounds: (low, high, least scale) [R, 1].

    The error of q at scale s is Σ i w² - 2 s Σ i w q + s² Σ i q², with importance i.
    """
    low, high, floor = bounds
    trials = search.store(np.maximum(search.shares * peak / np.maximum(np.abs(low), np.abs(high)), floor))
    q = rows[:, None, :] / trials[:, :, None]
    np.rint(q, out=q)
    np.clip(q, low[:, :, None], high[:, :, None], out=q)
    product = (q @ (importance * rows)[:, :, None])[:, :, 0]
    power = (np.square(q) @ importance[:, :, None])[:, :, 0]
    usable = (power > 0) & (product > 0)
    trials = search.store(np.maximum(np.where(usable, product / np.where(usable, power, 1.0), trials), floor))
    best = (trials * (trials * power - 2 * product)).argmin(axis=1)
    index = np.arange(len(rows))
    return q[index, best].astype(np.int8), trials[index, best]


def window(rows: FloatArray, bits: int, limit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least and greatest of each row's 2^bits integers; the heavier tail has one more than the other."""
    heavier = rows.max(axis=1) > -rows.min(axis=1)
    low = np.maximum(-(1 << bits - 1) + heavier, -limit).astype(np.float64)
    return low, np.minimum(low + (1 << bits) - 1, limit)


def block_window(bits: int, limit: int) -> tuple[float, float]:
    """Return the least and greatest of the 2^bits integers of blocks, whose scales may be negative."""
    return float(max(-(1 << bits - 1), -limit)), float((1 << bits - 1) - 1)


def scale_floor(rows: FloatArray, least_scale: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the lower bound on each row's scale: `least_scale`, and what float32 and int8 can represent."""
    peak = np.abs(rows).max(axis=1)
    usable: NDArray[np.float64] = np.maximum(peak / 2**20, TINY)
    return usable if least_scale is None else np.maximum(usable, least_scale)
