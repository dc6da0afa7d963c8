"""Compute ⟨g, Q(a) - a⟩ of an activation for many quantizers Q at once, in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import Affine

_CHUNK = 1 << 18  # elements of an activation sorted into bins at once
_BINS = (12, 16)  # log2 of the number of bins, minimum and maximum; a range may span 650 steps of an 8-bit quantizer
_BINNED = 10  # quantizers whose direct evaluation takes as long as one histogram
_CACHED = 1 << 15  # elements of an activation quantized at once, to stay in the cache


@dataclass(frozen=True)
class Staircases:
    """Quantizers as staircases: Q(a) = s (h - number of thresholds above a), with h the highest integer.

    thresholds: of all quantizers, concatenated; those of each begin at `starts`. scales, tops: s and h of each.
    """

    thresholds: NDArray[np.float64]
    starts: NDArray[np.int64]
    scales: NDArray[np.float64]
    tops: NDArray[np.float64]

    @classmethod
    def of(cls, quantizers: Sequence[Affine]) -> "Staircases":
        steps = [(np.arange(q.low, q.high) - q.zero_point + 0.5) * q.scale for q in quantizers]
        starts = np.cumsum([0, *(len(s) for s in steps[:-1])])
        scales, tops = zip(*((q.scale, q.high - q.zero_point) for q in quantizers), strict=True)
        return cls(np.concatenate(steps), starts, np.array(scales), np.array(tops, np.float64))

    def products(self, a: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ⟨g, Q(a) - a⟩ for each g of `rows` [R, E] and each quantizer, [R, quantizers].

        One histogram of a with weights g serves all quantizers. Its bins are so narrow that moving a threshold to the
        nearest edge hardly matters: the few values between are about half a step from either level anyway.
        """
        bins = 1 << int(np.clip(np.ceil(np.log2(4 * a.size)), *_BINS))
        least = a.min()
        pitch = np.float32((bins - 1) / max(float(a.max() - least), 1e-30))
        below = np.zeros((len(rows), bins + 1))
        for start in range(0, a.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            index = ((a[part] - least) * pitch).astype(np.intp)
            for total, g in zip(below, rows[:, part], strict=True):
                total[1:] += np.bincount(index, g, bins)
        np.cumsum(below, axis=1, out=below)
        edges = np.clip(np.rint((self.thresholds - least) * float(pitch)), 0, bins).astype(np.intp)
        sums = np.add.reduceat(below[:, edges], self.starts, axis=1)
        product: NDArray[np.float64] = self.scales * (self.tops * below[:, -1:] - sums) - (rows @ a)[:, None]
        return product


def rounding_sums(
    values: NDArray[np.float32], g: NDArray[np.float32], quantizers: Sequence[Affine]
) -> NDArray[np.float64]:
    """Sum ⟨g, Q(a) - a⟩² over samples and rows for each quantizer; values [n, E], g [n, rows, E]."""
    products = Staircases.of(quantizers).products
    if g.shape[1] * _BINNED > len(quantizers):
        products = partial(one_by_one, quantizers)
    sums = np.zeros(len(quantizers))
    for a, rows in zip(values, g, strict=True):
        sums += np.square(products(a, rows)).sum(axis=0)
    return sums


def one_by_one(quantizers: Sequence[Affine], a: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ⟨g, Q(a) - a⟩ for each g of `rows` [R, E] and each quantizer, [R, quantizers]."""
    products = np.zeros((len(rows), len(quantizers)))
    for start in range(0, a.size, _CACHED):
        part, seeds = a[start : start + _CACHED], rows[:, start : start + _CACHED]
        for k, quantizer in enumerate(quantizers):
            products[:, k] += seeds @ (quantizer(part) - part)
    return products
