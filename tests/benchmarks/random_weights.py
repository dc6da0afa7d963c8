"""Random weights that look trained, made block by block, so that a matrix of any size takes a few megabytes.

    W = σ diag(r) (√(1 - ρ) T + √ρ U diag(s) Vᵀ / ‖s‖) diag(c)

T holds Student's t with ν degrees of freedom (Cornish-Fisher expansion of a normal variate), U and V normal variates,
s_k = 1/√k for k up to the rank: a power law that ends in a bulk with heavy tails. r and c are log-normal. U and V are
rounded to multiples of 1/4 and 1/256, which makes every sum of the product exact in float32; the bytes then depend
neither on the size of the blocks nor on threads and BLAS.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32

BLOCK = 1 << 20  # elements made at once
RANK = 64
SHARE = 0.3  # ρ, of the product in the variance
FREEDOM = 5.0  # ν
SPREAD = 0.25  # standard deviation of log r and log c
OUTLIERS = (10.0, 30.0)  # range of the gain of an outlier channel


@dataclass(frozen=True)
class Stored:
    """A tensor whose values are held, float32 or int64: gains, biases, positions."""

    name: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def blocks(self) -> Iterator[NDArray[Any]]:
        yield self.values


@dataclass(frozen=True)
class Matrix:
    """A random matrix [rows, columns], float32, of elements with standard deviation `deviation`.

    With `gains` [rows], those of the norm in front, row k shrinks by √gain, as trained rows do behind outlier channels,
    and the deviation is that of a matrix which gives the same product with inputs of gain 1.
    """

    name: str
    shape: tuple[int, int]
    deviation: float
    seed: int
    gains: Floats | None = None

    def blocks(self, size: int = BLOCK) -> Iterator[Floats]:
        """Yield consecutive rows, about `size` elements at a time."""
        rows, columns = self.shape
        bulk, left, right, scales = (np.random.default_rng(s) for s in _seeds(self.seed, self.name).spawn(4))
        rank = min(RANK, max(1, min(self.shape) // 8))
        singular = np.arange(1, rank + 1, dtype=np.float32)[:, None] ** np.float32(-0.5)
        factor = np.round(256 * singular * _normal(right, (rank, columns))) / 256
        by_row, by_column = self._row_scales(scales), self.deviation * _log_normal(scales, columns)
        dense, low = np.float32((1 - SHARE) ** 0.5), np.float32((SHARE / np.square(singular).sum()) ** 0.5)
        step = max(1, size // columns)
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            values = dense * _student(_normal(bulk, (count, columns)))
            values += low * (_quarters(left, (count, rank)) @ factor)
            values *= by_row[begin : begin + count, None]
            values *= by_column
            yield values

    def _row_scales(self, rng: np.random.Generator) -> Floats:
        scales = _log_normal(rng, self.shape[0])
        if self.gains is None:
            return scales
        size = np.abs(self.gains)
        scales /= np.sqrt(size)
        scales /= np.sqrt(np.mean(np.square(scales * size)))
        return scales


def gains(name: str, width: int, seed: int, power: int = 1) -> Floats:
    """Draw the gains [width] of a norm: log-normal, a few channels 10 to 30, the same ones in all norms of a seed.

    The gain of these channels is raised to `power`: 0 leaves no outliers, -1 shrinks where other norms amplify.
    """
    rng = np.random.default_rng(_seeds(seed, name))
    values = _log_normal(rng, width)
    channels = np.random.default_rng([seed, width]).permutation(width)[: max(1, min(6, width // 128))]
    values[channels] = rng.uniform(*OUTLIERS, channels.size) ** power
    return values


def offsets(name: str, width: int, seed: int) -> Floats:
    """Draw biases [width]."""
    return np.float32(0.1) * _student(_normal(np.random.default_rng(_seeds(seed, name)), (width,)))


def _seeds(seed: int, name: str) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(name.encode())])


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_normal(shape, np.float32)


def _quarters(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return np.round(4 * np.clip(_normal(rng, shape), -4, 4)) / 4


def _student(normal: Floats) -> Floats:
    """Turn normal variates into Student's t of variance 1, to second order in 1/ν."""
    square = np.square(normal)
    first, second = (square + 1) / (4 * FREEDOM), ((5 * square + 16) * square + 3) / (96 * FREEDOM**2)
    return normal * (1 + first + second) * np.float32((1 - 2 / FREEDOM) ** 0.5)


def _log_normal(rng: np.random.Generator, count: int) -> Floats:
    """Draw scales [count] with a mean square of 1."""
    scales = np.exp(np.float32(SPREAD) * _normal(rng, (count,)))
    scales /= np.sqrt(np.mean(np.square(scales)))
    return scales
