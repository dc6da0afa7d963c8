"""Extreme-value model: the clipping error of values beyond the greatest one observed on few samples.

A new value exceeds the greatest of N observed ones, M, with probability about 1 / N. Its excess is close to exponential
(Pickands 1975, Balkema and de Haan 1974), with a mean s estimated from the largest observed values. The mean squared
error over all values of clipping such values at c:

    E[(a - c)²; a > M] = ((M - c)² + 2 (M - c) s + 2 s²) / N      c ≤ M
                       = 2 s² exp(-(c - M) / s) / N               c ≥ M

A network with small tensors, measured on a hundred samples, loses more to such clipping than to rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import Affine

FEW_VALUES = 1 << 15  # observed values up to which the model is needed
_TAIL = 20  # one value in 20 belongs to the tail
_MIN_TAIL = 5  # values
_REACH = 6.0  # mean excesses by which a range may exceed the observed one


@dataclass(frozen=True)
class Tail:
    """One tail of a distribution. end: greatest value, at least 0. excess: mean excess over a high threshold."""

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
        """Return E[(a - end)²; a > self.end] times the number of observed values."""
        gap = self.end - end
        if gap >= 0:
            return gap**2 + 2 * gap * self.excess + 2 * self.excess**2
        return 2 * self.excess**2 * math.exp(gap / self.excess) if self.excess > 0 else 0.0


@dataclass(frozen=True)
class ExtremeValues:
    """Both tails of a tensor, estimated from `count` values; `low` is that of the negated tensor."""

    low: Tail
    high: Tail
    count: int

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> "ExtremeValues":
        values = values.reshape(-1)
        return cls(Tail.of(-values), Tail.of(values), values.size)

    @property
    def reach(self) -> tuple[float, float]:
        """Widest range worth trying."""
        low, high = (t.end + _REACH * t.excess for t in (self.low, self.high))
        return -low, high

    def beyond(self, quantizer: Affine) -> float:
        """Return the mean squared error, over all values, of clipping values beyond the observed range."""
        low, high = quantizer.range
        return (self.low.beyond(-low) + self.high.beyond(high)) / self.count


def with_extreme_values(
    tables: Mapping[str, Mapping[int, Sequence[Affine]]],
    measured: Sequence[Mapping[int, NDArray[np.float64]]],
    extremes: Mapping[str, ExtremeValues],
) -> tuple[Mapping[int, NDArray[np.float64]], ...]:
    """Add the clipping of extreme values to `measured`, δ of each activation, width and quantizer.

    tables: quantizers of each activation by its tensor, in the order of `measured`.

    δ per unit of squared error follows from the quantizer of full width and widest range, whose squared error is a
    twelfth of its squared step.
    """
    result: list[Mapping[int, NDArray[np.float64]]] = []
    for (tensor, table), values in zip(tables.items(), measured, strict=True):
        extreme, bits = extremes.get(tensor), max(table)
        if extreme is None:
            result.append(values)
            continue
        widest = int(np.argmax([q.scale for q in table[bits]]))
        unit = 12 * values[bits][widest] / table[bits][widest].scale ** 2
        result.append({b: v + unit * np.array([extreme.beyond(q) for q in table[b]]) for b, v in values.items()})
    return tuple(result)
