"""Rows of samples, read on demand."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 24  # bytes of samples per read when all are read in sequence

Array = NDArray[Any]


class Rows(Protocol):
    """Samples of one input, read on demand: an array, a file, or a conversion of either."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: Any, /) -> Array:
        """The samples `rows` (indices or a slice)."""


@dataclass(frozen=True, eq=False)
class Converted:
    """`convert` applied lazily to `rows`; each result has the shape `sample`."""

    rows: Rows
    sample: tuple[int, ...]
    dtype: np.dtype[Any]
    convert: Callable[[Array], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.shape[0], *self.sample)

    def __getitem__(self, rows: Any, /) -> Array:
        return self.convert(self.rows[rows])


def blocks(rows: Rows, picked: NDArray[np.int64]) -> Iterator[Array]:
    """Yield the samples `picked` of `rows`, about _BLOCK bytes at a time."""
    size = max(int(np.prod(rows.shape[1:])) * rows.dtype.itemsize, 1)
    for part in np.array_split(picked, -(-len(picked) * size // _BLOCK) or 1):
        yield rows[part]


def evenly(count: int, limit: int | None, step: int = 1) -> NDArray[np.int64]:
    """Evenly spaced indices of at most `limit` of `count` samples, rounded to a multiple of `step`."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.linspace(0, count - 1, max(limit // step, 1) * step).astype(np.int64)
