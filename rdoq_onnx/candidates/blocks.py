"""Rows of a layer's weights in blocks that have the same inputs and therefore share one covariance.

A block is a group of a convolution, or a part of the inputs of a very wide layer (`in_parts`). One row, with its one
scale, may extend over several blocks: over all parts, and for ConvTranspose over all groups.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.linear import Linear

Array = NDArray[Any]


@dataclass(frozen=True)
class Blocks:
    """The B blocks of one layer, each with O rows of K weights."""

    linear: Linear

    @property
    def shared(self) -> bool:
        """Whether all groups share one scale per row."""
        return self.linear.op_type == "ConvTranspose"

    @property
    def parts(self) -> int:
        return int(in_parts(np.empty((1, self.linear.inputs, 1))).shape[0])

    @property
    def single(self) -> bool:
        """Whether any subset of rows can be cut into blocks separately."""
        return self.linear.group == 1

    def cut(self, rows: Array) -> Array:
        """Cut rows [units, weights of a row] into blocks [B, O, K]."""
        grouped = self._grouped(rows)
        return np.ascontiguousarray(in_parts(grouped.swapaxes(1, 2)).swapaxes(1, 2))

    def join(self, blocks: Array) -> Array:
        """Invert `cut`."""
        groups = self.linear.group
        if self.parts > 1:
            apart = blocks.reshape(groups, self.parts, *blocks.shape[1:])
            blocks = np.moveaxis(apart, 1, 2).reshape(groups, blocks.shape[1], -1)[..., : self.linear.inputs]
        if self.shared:
            return blocks.swapaxes(0, 1).reshape(blocks.shape[1], -1)
        return blocks.reshape(-1, blocks.shape[-1])

    def spread(self, values: Array) -> Array:
        """Repeat the T values of each row [units, T] for all of its blocks, [B, O·T]."""
        groups = self.linear.group
        flat = values.reshape(1 if self.shared else groups, -1)
        return np.repeat(np.broadcast_to(flat, (groups, flat.shape[1])), self.parts, axis=0)

    def gather(self, values: Array, trials: int) -> Array:
        """Sum values [B, O·T] over the blocks of each row, [units, T]."""
        summed: Array = values.reshape(self.linear.group, self.parts, -1).sum(axis=1)
        return summed.sum(axis=0).reshape(-1, trials) if self.shared else summed.reshape(-1, trials)

    def _grouped(self, rows: Array) -> Array:
        if self.shared:
            return rows.reshape(len(rows), self.linear.group, -1).swapaxes(0, 1)
        return rows.reshape(self.linear.group, -1, rows.shape[1])


MOST_INPUTS = 2048  # inputs that share one covariance; wider layers have one for each part


def in_parts(values: NDArray[Any]) -> NDArray[Any]:
    """Split [G, K, P] into [G·parts, B, P] with B at most MOST_INPUTS; zeros pad the last part."""
    groups, inputs, positions = values.shape
    if inputs <= MOST_INPUTS:
        return values
    parts = -(-inputs // MOST_INPUTS)
    width = -(-inputs // parts)
    padded = np.pad(values, ((0, 0), (0, parts * width - inputs), (0, 0)))
    return padded.reshape(groups * parts, width, positions)
