"""Samples in blocks: the parts that sums over samples are computed in, whoever computes them.

A block is a run of whole batches. Which samples it has depends on their number and on the batch size alone, never on
how many processes share the work, so that its sums have the same bits everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples

MOST_BLOCKS = 32  # of a sum
_ALL = 1 << 62  # bytes


@dataclass(frozen=True)
class Block:
    """Consecutive samples, which run `batch` at a time. first: the number of samples that ran before them."""

    samples: Samples
    batch: int
    first: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Yield (number of samples, feeds) of each batch."""
        return self.samples.counted_batches(self.batch)

    def loaded(self) -> "Block":
        """Return the block with its samples in memory, so that it can travel."""
        return replace(self, samples=self.samples.loaded(_ALL))


def in_blocks(samples: Samples, batch: int, first: int = 0, most: int = MOST_BLOCKS) -> list[Block]:
    """Divide `samples` into at most `most` blocks of nearly as many batches each; first: as in Block."""
    spans = samples.spans(batch)
    parts = np.array_split(np.arange(len(spans)), min(most, len(spans))) if spans else []
    edges = [(spans[part[0]][0], spans[part[-1]][1]) for part in parts]
    return [Block(samples.take(slice(start, stop)), batch, first + start) for start, stop in edges]
