"""What few samples have not shown: values beyond the greatest of them.

Where N values were seen, the next one is beyond the greatest, M, once in N times, and then by an excess that is close
to exponential (Pickands 1975, Balkema and de Haan 1974) with a mean s that the largest values seen tell. What a range
that ends at c clips of such values, on average over all values:

    E[(a - c)²; a > M] = ((M - c)² + 2 (M - c) s + 2 s²) / N      c ≤ M
                       = 2 s² exp(-(c - M) / s) / N               c ≥ M

A network whose tensors have a few numbers, measured on a hundred samples, loses more to this than to rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import Affine

FEW = 1 << 15  # values; more of them speak for themselves
_TAIL = 20  # one in so many belongs to the tail
_MIN_TAIL = 5  # values
_REACH = 6.0  # mean excesses that a range may go beyond what was seen


@dataclass(frozen=True)
class Tail:
    """end: the greatest value, at least 0. excess: mean excess over a high threshold."""

    end: float
    excess: float

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> "Tail":
        count = min(max(values.size // _TAIL, _MIN_TAIL), values.size - 1)
        if not count or values.max() <= 0:
            return cls(max(float(values.max()), 0.0), 0.0)
        largest = np.sort(values)[-count - 1 :]
        return cls(float(largest[-1]), float(np.mean(largest[1:] - max(largest[0], 0.0))))

    def beyond(self, end: float) -> float:
        """E[(a - end)²; a > self.end], times the number of values seen."""
        gap = self.end - end
        if gap >= 0:
            return gap**2 + 2 * gap * self.excess + 2 * self.excess**2
        return 2 * self.excess**2 * math.exp(gap / self.excess) if self.excess > 0 else 0.0


@dataclass(frozen=True)
class Tails:
    """Both ends of a tensor of which so many values were seen; `low` is that of its negative."""

    low: Tail
    high: Tail
    seen: int

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> "Tails":
        values = values.reshape(-1)
        return cls(Tail.of(-values), Tail.of(values), values.size)

    @property
    def reach(self) -> tuple[float, float]:
        """The widest range worth trying."""
        low, high = (t.end + _REACH * t.excess for t in (self.low, self.high))
        return -low, high

    def beyond(self, quantizer: Affine) -> float:
        """Mean squared error, over all values, of what was not seen and the quantizer clips."""
        low, high = quantizer.range
        return (self.low.beyond(-low) + self.high.beyond(high)) / self.seen


def with_unseen(
    tables: Mapping[str, Mapping[int, Sequence[Affine]]],
    found: Sequence[Mapping[int, NDArray[np.float64]]],
    tails: Mapping[str, Tails],
) -> tuple[Mapping[int, NDArray[np.float64]], ...]:
    """δ of each activation, width and quantizer, `found` on samples, with what they have not shown.

    tables: the quantizers of each activation by its tensor, in the order of `found`.

    δ of a unit of squared error is read off from the finest quantizer's, whose error is a twelfth of its step squared.
    """
    result: list[Mapping[int, NDArray[np.float64]]] = []
    for (tensor, table), values in zip(tables.items(), found, strict=True):
        known, bits = tails.get(tensor), max(table)
        if known is None:
            result.append(values)
            continue
        widest = int(np.argmax([q.scale for q in table[bits]]))
        unit = 12 * values[bits][widest] / table[bits][widest].scale ** 2
        result.append({b: v + unit * np.array([known.beyond(q) for q in table[b]]) for b, v in values.items()})
    return tuple(result)
