"""Find weights that lie on a grid already, as exports of quantized training, GPTQ and BitNet do.

Each row of such a weight is, up to float rounding,

    w = s·q,    q integers, |q| ≤ 127

s is the largest that fits, so that q takes the fewest bits: s = max |w| / n, where n, the |q| of the greatest weight,
is the least from 1 to 127 that makes all of n w / max |w| integers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import ROUNDING, WeightCodes

_LEVELS = 127  # greatest |q|
# Tolerance, relative to q, and least number of nonzero weights: of float32 weights, and of those stored as float16.
_KINDS = ((ROUNDING, 2), (2.0**-10, 16))
_SEEN = 32  # weights of each row, the largest, that rule out nearly all rows without a grid
_BLOCK = 1 << 12  # rows examined at once

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """The grid of each row of a weight.

    codes: integers [units, K] and float32 scales [units]; both are 0 in rows without a grid. whole: whether there is
    one in each row that has more than one nonzero weight.
    """

    codes: WeightCodes
    whole: bool

    @classmethod
    def of(cls, rows: NDArray[np.floating[Any]]) -> "Grid":
        """Find the grids of `rows` [units, K]."""
        codes = WeightCodes(np.zeros(rows.shape, np.int8), np.zeros(len(rows), np.float32))
        filled = np.count_nonzero(rows, axis=1)
        left = np.flatnonzero((filled > 1) & np.isfinite(rows).all(axis=1))
        for tolerance, enough in _KINDS:
            tried = left[filled[left] >= enough]
            for first in range(0, len(tried), _BLOCK):
                part = tried[first : first + _BLOCK]
                codes.integers[part], codes.scales[part] = _on_grid(rows[part].astype(np.float64), tolerance)
            left = left[codes.scales[left] == 0]
        return cls(codes, bool(codes.scales.any()) and not len(left))

    def fits(self, bits: int, limit: int) -> NDArray[np.bool_]:
        """Return the rows [units] whose integers are within one of the windows of `bits` bits, and within `limit`."""
        least, greatest = (self.codes.integers.min(axis=1).astype(int), self.codes.integers.max(axis=1).astype(int))
        half = (1 << bits) >> 1
        windows = [(least >= low) & (greatest < low + (1 << bits)) for low in (-half, 1 - half)]
        inside: NDArray[np.bool_] = (windows[0] | windows[1]) & (np.maximum(-least, greatest) <= limit)
        return inside & (self.codes.scales > 0)


def _on_grid(rows: Float, tolerance: float) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integers and scales of nonzero `rows`, both 0 in those without a grid."""
    integers = np.zeros(rows.shape, np.int8)
    seen = min(_SEEN, rows.shape[1])
    largest = np.sort(np.partition(np.abs(rows), rows.shape[1] - seen, axis=1)[:, -seen:], axis=1)
    peaks = largest[:, -1:]
    largest = largest / peaks
    steps = np.diff(largest, axis=1)  # equal, or a step of a grid apart
    left = np.flatnonzero(((steps <= 2 * tolerance) | (steps >= 1 / _LEVELS - 2 * tolerance)).all(axis=1))
    for n in range(1, _LEVELS + 1):
        chosen = left[_whole(n * largest[left], tolerance)]
        scaled = n / peaks[chosen] * rows[chosen]
        fits = _whole(scaled, tolerance)
        integers[chosen[fits]] = np.rint(scaled[fits])
        left = np.setdiff1d(left, chosen[fits], assume_unique=True)
    return integers, _scales(rows, integers)


def _whole(values: Float, tolerance: float) -> NDArray[np.bool_]:
    """Whether all values of each row are integers, relative to their size: only 0 counts as 0."""
    nearest = np.rint(values)
    whole: NDArray[np.bool_] = np.all(np.abs(values - nearest) <= tolerance * np.abs(nearest), axis=1)
    return whole


def _scales(rows: Float, integers: NDArray[np.int8]) -> NDArray[np.float32]:
    """Return the float32 scale that reproduces each row best: that of least squares, or one next to it."""
    levels = integers.astype(np.float32)
    power = np.square(levels, dtype=np.float64).sum(axis=1)
    middle = ((rows * levels).sum(axis=1) / np.maximum(power, 1)).astype(np.float32)
    ends = (np.float32(0), np.float32(np.inf))
    trials = np.stack([middle, *(np.nextafter(middle, end) for end in ends)])
    errors = [np.square(levels * scales[:, None] - rows).sum(axis=1) for scales in trials]
    best: NDArray[np.float32] = trials[np.argmin(errors, axis=0), np.arange(len(rows))]
    return np.where(power > 0, best, np.float32(0))
