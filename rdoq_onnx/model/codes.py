"""Quantized values: integers and scales of a layer, quantizer of an activation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class WeightCodes:
    """One layer's channels at one width: `integers` int8 [units, K] and `scales` float32 [units]."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """The dequantized weights, [units, K]."""
        return self.integers * self.scales[:, None]


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


def stored(scales: FloatArray) -> NDArray[np.float64]:
    """Round scales to 11 significant bits, so that float16 stores them exactly."""
    mantissa, exponent = np.frexp(scales.astype(np.float64))
    result: NDArray[np.float64] = np.ldexp(np.rint(mantissa * 2048) / 2048, exponent)
    return result
