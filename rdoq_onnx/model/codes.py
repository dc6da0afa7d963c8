"""Quantized values: integers and scales of a layer, quantizer of an activation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

ROUNDING = 2.0**-21  # relative difference that a few roundings of float32 explain
_HALF = np.finfo(np.float16)


@dataclass(frozen=True)
class WeightCodes:
    """One layer's channels at one width: `integers` int8 [units, K] and `scales` float32.

    scales: [units], or [units, B] where each of B blocks of consecutive weights has its own. Those of blocks may be
    negative.
    """

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """The dequantized weights, [units, K]."""
        if self.scales.ndim == 1:
            return self.integers * self.scales[:, None]
        blocks = self.integers.reshape(*self.scales.shape, -1) * self.scales[:, :, None]
        return blocks.reshape(self.integers.shape)

    def change(self, rows: FloatArray) -> FloatArray:
        """Return ΔW of the float weights `rows` [units, K]; 0 in rows that differ by float rounding alone."""
        change: FloatArray = self.values - rows
        close = np.flatnonzero(np.abs(change[:, 0]) <= ROUNDING * np.abs(rows[:, 0]))
        same = (np.abs(change[close]) <= ROUNDING * np.abs(rows[close])).all(axis=1)
        change[close[same]] = 0
        return change

    def replaced(self, others: "WeightCodes", rows: NDArray[np.bool_]) -> "WeightCodes":
        """Return these codes with `rows` [units] of `others`."""
        integers = np.where(rows[:, None], others.integers, self.integers)
        return WeightCodes(integers, np.where(_per_unit(rows, self.scales), others.scales, self.scales))

    def taken(self, units: NDArray[np.int64]) -> "WeightCodes":
        """Return these `units` alone."""
        return WeightCodes(self.integers[units], self.scales[units])


@dataclass(frozen=True)
class Affine:
    """A per-tensor quantizer to 8-bit integers within low..high, UINT8 unless `signed`."""

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
        """The smallest and the largest value that it can represent."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    def __call__(self, x: FloatArray) -> FloatArray:
        """Apply QuantizeLinear, the clip to low..high and DequantizeLinear to `x`."""
        scale = np.float32(self.scale)
        q = x / scale
        np.rint(q, out=q)
        np.clip(q, self.low - self.zero_point, self.high - self.zero_point, out=q)
        q *= scale
        return q


def _per_unit(values: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[Any]:
    """Give `values` [units] the rank of `scales`."""
    return values.reshape(-1, *[1] * (scales.ndim - 1))


def stored(scales: FloatArray) -> NDArray[np.float64]:
    """Round scales to 11 significant bits, so that float16 stores them exactly."""
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    result: NDArray[np.float64] = np.ldexp(np.rint(mantissa * 2048) / 2048, exponent)
    return result


def halved(scales: FloatArray) -> NDArray[np.float64]:
    """Round scales of blocks to the nearest float16, never to 0: a file has so many that each takes 16 bits."""
    half = np.clip(np.abs(scales), _HALF.smallest_subnormal, _HALF.max).astype(np.float16)
    return np.copysign(half.astype(np.float64), scales)
