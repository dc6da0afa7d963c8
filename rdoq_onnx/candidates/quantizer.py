"""Scales and rounding, in numpy alone: what a channel or an activation becomes at each bit width.

Weights (one scale s per channel, zero point 0, so that the emitted DequantizeLinear is s·q):

    q = clip(round(w / s), l, l + 2^b - 1),    (s, l) = argmin ‖w - s·q‖²

The window of 2^b integers starts at l = -2^(b-1), or at -2^(b-1) + 1 where the heavier tail is positive; it need not
hold zero in its middle, but zero stays an integer, as kernels want.

Activations (one scale and zero point per tensor, unsigned integers):

    q = clip(round(a / s) + z, 0, 2^b - 1),    â = s·(q - z)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import WeightCodes, stored

FloatArray = NDArray[np.floating[Any]]

# Shares of a channel's largest magnitude that its integer range may cover. Few bits gain from clipping more; over 1 the
# outermost integer stays unused, which suits channels of few values.
_RANGE_SHARES = np.concatenate([np.geomspace(0.12, 0.7, 8, endpoint=False), np.linspace(0.7, 1.05, 8), [1.2, 1.5, 2.0]])
_BLOCK = 1 << 15  # weights times trials that are rounded at once: they stay in the cache
TINY = float(np.finfo(np.float32).tiny)


def quantize_rows(
    rows: FloatArray,
    bits: int,
    limit: int,
    least_scale: NDArray[np.float64] | None = None,
    importance: FloatArray | None = None,
) -> WeightCodes:
    """Round each row of `rows` [units, K] to `bits` bits at the scale of least squared error.

    limit: bound on the integers' magnitude. least_scale [units]: scales may not be smaller. importance [units, K]: what
    each weight's squared error counts, 1 by default.
    At 0 bits every integer is 0 and the scale, which then means nothing, is one that kernels digest.
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
    return WeightCodes(integers, scales.astype(np.float32))


def _least_error(
    rows: FloatArray, peak: FloatArray, importance: FloatArray, bounds: tuple[FloatArray, FloatArray, FloatArray]
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Integers and scale of each row, for the best of all range shares; bounds: (low, high, least scale) [R, 1].

    The error of q at scale s is Σ i w² - 2 s Σ i w q + s² Σ i q², i the importance.
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
    rest = np.arange(len(rows))
    return q[rest, best].astype(np.int8), trials[rest, best]


def window(rows: FloatArray, bits: int, limit: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the greatest integer of each row: 2^bits of them, one more on the side of the heavier tail."""
    heavier = rows.max(axis=1) > -rows.min(axis=1)
    low = np.maximum(-(1 << bits - 1) + heavier, -limit).astype(np.float64)
    return low, np.minimum(low + (1 << bits) - 1, limit)


def scale_floor(rows: FloatArray, least_scale: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """The least scale of each row: that asked for, and one that float32 and int8 can work with."""
    peak = np.abs(rows).max(axis=1)
    usable: NDArray[np.float64] = np.maximum(peak / 2**20, TINY)
    return usable if least_scale is None else np.maximum(usable, least_scale)


