"""Codes of a large layer, by width, in a file of the scratch folder: read when they are asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import WeightCodes


@dataclass(frozen=True)
class SpooledCodes(Mapping[int, WeightCodes]):
    """A mapping from widths to codes. scales: float32 [widths, units], or [widths, units, B] of blocks.

    The file `name` of `folder` has the integers, int8 [widths, units, K].
    """

    folder: str
    name: str
    widths: tuple[int, ...]
    scales: NDArray[np.float32]

    def __getitem__(self, bits: int) -> WeightCodes:
        k = self.widths.index(bits)
        return WeightCodes(self._integers[k], self.scales[k])

    def __iter__(self) -> Iterator[int]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)

    def chosen(self, bits: NDArray[np.int64]) -> WeightCodes:
        """Return the codes with each channel at its width of `bits` [units]."""
        rows, units = np.searchsorted(self.widths, bits), np.arange(len(bits))
        return WeightCodes(self._integers[rows, units], self.scales[rows, units])

    def scaled(self, scales: NDArray[np.float32]) -> "SpooledCodes":
        """Return the same integers at other `scales`."""
        return replace(self, scales=scales)

    @property
    def _integers(self) -> NDArray[np.int8]:
        # Mapped anew each time: what stays mapped stays in memory.
        return np.asarray(np.load(Path(self.folder, self.name + ".npy"), mmap_mode="r"))
