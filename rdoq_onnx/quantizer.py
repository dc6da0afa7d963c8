"""Scales and rounding, in numpy alone: what a channel or an activation becomes at each bit width.

Weights (one scale s per channel, zero point 0, so that the emitted DequantizeLinear is s·q):

    q = clip(round(w / s), l, l + 2^b - 1),    (s, l) = argmin ‖w - s·q‖²

The window of 2^b integers starts at l = -2^(b-1), or at -2^(b-1) + 1 where the heavier tail is positive; it need not
hold zero in its middle, but zero stays an integer, as kernels want.

Activations (one scale and zero point per tensor, unsigned integers):

    q = clip(round(a / s) + z, 0, 2^b - 1),    â = s·(q - z)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

# Shares of a channel's largest magnitude that its integer range may cover. Few bits gain from clipping more; over 1 the
# outermost integer stays unused, which suits channels of few values.
_RANGE_SHARES = np.concatenate([np.geomspace(0.12, 0.7, 8, endpoint=False), np.linspace(0.7, 1.05, 8), [1.2, 1.5, 2.0]])
# The same for a tensor's range, by bits: (tightest, widest).
_CLIPS = {1: (0.05, 0.5), 2: (0.1, 0.6), 3: (0.14, 0.8), 4: (0.2, 1.0), 5: (0.25, 1.0), 6: (0.3, 1.0), 7: (0.35, 1.0)}
_CLIPS[8] = (0.4, 1.0)
_CLIPS_TRIED = 8
_COARSE = 5  # bits up to which rounding costs so much that clipping pays even where the ends of a range are uncertain
_REFINEMENTS = (0.82, 0.91, 1.1, 1.21)
_BLOCK = 1 << 15  # weights times trials that are rounded at once: they stay in the cache
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class WeightCodes:
    """One layer's channels at one width: `integers` int8 [units, K] and `scales` float32 [units]."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """The weights as they are decoded, [units, K]."""
        return self.integers * self.scales[:, None]


@dataclass(frozen=True)
class Affine:
    """A per-tensor quantizer to the integers low..high of a byte, unsigned unless `signed`."""

    scale: float
    zero_point: int
    low: int
    high: int
    signed: bool = False

    @property
    def bits(self) -> int:
        return int(self.high - self.low).bit_length()

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest value that it can give."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    def __call__(self, x: FloatArray) -> FloatArray:
        """The values of `x` after QuantizeLinear, the clip to low..high and DequantizeLinear."""
        scale = np.float32(self.scale)
        q = x / scale
        np.rint(q, out=q)
        np.clip(q, self.low - self.zero_point, self.high - self.zero_point, out=q)
        q *= scale
        return q


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
    usable: NDArray[np.float64] = np.maximum(peak / 2**20, _TINY)
    return usable if least_scale is None else np.maximum(usable, least_scale)


def stored(scales: FloatArray) -> NDArray[np.float64]:
    """Scales as the file holds them: with 11 significant bits, so that half precision is exact."""
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    result: NDArray[np.float64] = np.ldexp(np.rint(mantissa * 2048) / 2048, exponent)
    return result


def affine(low: float, high: float, bits: int, symmetric: bool = False) -> Affine:
    """The quantizer of `bits` bits for values from low to high, which clips the others.

    Zero is represented exactly; a range without negative values uses every integer for the positive ones;
    one of zero alone is taken as 0 to 1, since with a tiny scale the next layer's bias would not fit into INT32.
    symmetric: signed integers and a zero point of 0; at 8 bits, positive values then have 127 of them.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    high = 1.0 if low == high else high
    if symmetric:
        least, greatest = (0, min((1 << bits) - 1, 127)) if low == 0 else (-(1 << bits - 1), (1 << bits - 1) - 1)
        reach = max(high / max(greatest, 1), low / least if least else 0.0)
        return Affine(float(np.float32(max(reach, _TINY * 2**20))), 0, least, greatest, signed=True)
    levels = (1 << bits) - 1
    scale = float(np.float32(max((high - low) / levels, _TINY * 2**20)))
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, levels)), 0, levels)


def affine_candidates(
    low: float, high: float, bits: int, symmetric: bool = False, uncertain: bool = False
) -> list[Affine]:
    """Quantizers of `bits` bits for a tensor that spans low..high, from the whole range to a tight clip.

    The fewer the bits, the tighter the clips that are tried. uncertain: few samples have shown the range; over 5 bits
    it is then taken whole.
    """
    if uncertain and bits > _COARSE:
        return [affine(low, high, bits, symmetric)]
    shares = np.geomspace(*_CLIPS[bits], _CLIPS_TRIED)[::-1]
    return list(dict.fromkeys(affine(low * share, high * share, bits, symmetric) for share in shares))


def refined(quantizer: Affine, least: float, greatest: float) -> list[Affine]:
    """`quantizer`, and others of its width whose range ends a little further in or out, on either side.

    No range goes beyond least..greatest, those of the tensor: a Relu6 would then no longer be implied.
    """
    low, high = quantizer.range
    sides = [(1.0, f) for f in _REFINEMENTS] + ([(f, 1.0) for f in _REFINEMENTS] if low < 0 else [])
    ends = [(max(low * a, least), min(high * b, greatest)) for a, b in sides]
    return list(dict.fromkeys([quantizer, *(affine(*end, quantizer.bits, quantizer.signed) for end in ends)]))
