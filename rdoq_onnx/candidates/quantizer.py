"""Scales and rounding of channels and activations at each width, in numpy only.

Weights (one scale s per channel, zero point 0, so that the emitted DequantizeLinear is s·q):

    q = clip(round(w / s), l, l + 2^b - 1),    (s, l) = argmin ‖w - s·q‖²

The window of 2^b integers starts at l = -2^(b-1), or at -2^(b-1) + 1 if the heavier tail is positive. Zero need not lie
in its middle, but is always one of its integers, as kernels require.

A row that lies on a grid already (model/grid.py) keeps it wherever the window holds its integers.

Activations (one scale and zero point per tensor, unsigned integers):

    q = clip(round(a / s) + z, 0, 2^b - 1),    â = s·(q - z)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import WeightCodes, stored
from rdoq_onnx.model.grid import Grid

FloatArray = NDArray[np.floating[Any]]

# Shares of a channel's largest magnitude that the integer range may cover. Few bits gain from more clipping; above 1
# the outermost integer stays unused, which suits channels with few distinct values.
_RANGE_SHARES = np.concatenate([np.geomspace(0.12, 0.7, 8, endpoint=False), np.linspace(0.7, 1.05, 8), [1.2, 1.5, 2.0]])
_BLOCK = 1 << 15  # weights times trials rounded at once, to stay in the cache
TINY = float(np.finfo(np.float32).tiny)


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
    low, high = window(rows, bits, limit)
    integers, scales = np.empty(rows.shape, np.int8), np.empty(len(rows))
    importance = np.broadcast_to(importance, rows.shape)
    size = max(1, _BLOCK // (len(_RANGE_SHARES) * max(rows.shape[1], 1)))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        bounds = low[part, None], high[part, None], floor[part, None]
        integers[part], scales[part] = _least_error(rows[part], peak[part, None], importance[part], bounds)
    codes = WeightCodes(integers, scales.astype(np.float32))
    return codes if grid is None else on_grid(codes, grid, bits, limit, floor)


def on_grid(codes: WeightCodes, grid: Grid, bits: int, limit: int, floor: NDArray[np.float64]) -> WeightCodes:
    """Replace the rows of `codes` whose grid `bits` bits hold, which costs nothing, at full precision of the scale."""
    fits = grid.fits(bits, limit) & (grid.codes.scales >= floor)
    return codes.replaced(grid.codes, fits) if fits.any() else codes


def _least_error(
    rows: FloatArray, peak: FloatArray, importance: FloatArray, bounds: tuple[FloatArray, FloatArray, FloatArray]
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Return integers and scale of each row at the best range share; bounds: (low, high, least scale) [R, 1].

    The error of q at scale s is Σ i w² - 2 s Σ i w q + s² Σ i q², with importance i.
    """
    low, high, floor = bounds
    trials = stored(np.maximum(_RANGE_SHARES * peak / np.maximum(np.abs(low), np.abs(high)), floor))
    q = rows[:, None, :] / trials[:, :, None]
    np.rint(q, out=q)
    np.clip(q, low[:, :, None], high[:, :, None], out=q)
    product = (q @ (importance * rows)[:, :, None])[:, :, 0]
    power = (np.square(q) @ importance[:, :, None])[:, :, 0]
    usable = (power > 0) & (product > 0)
    trials = stored(np.maximum(np.where(usable, product / np.where(usable, power, 1.0), trials), floor))
    best = (trials * (trials * power - 2 * product)).argmin(axis=1)
    index = np.arange(len(rows))
    return q[index, best].astype(np.int8), trials[index, best]


def window(rows: FloatArray, bits: int, limit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least and greatest of each row's 2^bits integers; the heavier tail has one more than the other."""
    heavier = rows.max(axis=1) > -rows.min(axis=1)
    low = np.maximum(-(1 << bits - 1) + heavier, -limit).astype(np.float64)
    return low, np.minimum(low + (1 << bits) - 1, limit)


def scale_floor(rows: FloatArray, least_scale: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the lower bound on each row's scale: `least_scale`, and what float32 and int8 can represent."""
    peak = np.abs(rows).max(axis=1)
    usable: NDArray[np.float64] = np.maximum(peak / 2**20, TINY)
    return usable if least_scale is None else np.maximum(usable, least_scale)
