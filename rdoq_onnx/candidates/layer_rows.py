"""Rounding of one layer: scales are searched together with error-compensated rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.candidates.quantizer import block_window, on_grid, quantize_blocks, quantize_rows, scale_floor, window
from rdoq_onnx.model.codes import WeightCodes, halved, stored
from rdoq_onnx.model.grid import Grid

Float = NDArray[np.float64]
Rows = NDArray[np.floating[Any]]

_DAMPING = 0.02  # of the diagonal that weights the first search of scales, as a share of its mean
# Scales tried with compensation, relative to the best one without.
_TRIALS = (0.76, 0.88, 1.0, 1.12, 1.26)
_FINE_TRIALS = (0.94, 1.0)
_FINE_LEVELS = 31
_TINY = 1e-30
_TRIED_AT_ONCE = 1 << 12  # rows times trials rounded at once, so that a few columns fit the cache


@dataclass(frozen=True)
class LayerRows:
    """The weights of a layer as rows [units, weights of a row].

    limit: bound on the integers' magnitude. least_scale [units]: lower bound on scales. block: how many consecutive
    weights of a row share a scale, 0 for all of them; see `block_sizes`.
    """

    blocks: Blocks
    rows: Rows
    limit: int
    least_scale: Float | None
    block: int = 0

    @cached_property
    def grid(self) -> Grid:
        """The grid that the rows lie on, which rounding keeps where the width allows."""
        return Grid.of(self.rows)

    def starts(self, covariance: Float, widths: tuple[int, ...]) -> dict[int, WeightCodes]:
        """Round to nearest at each width, with scales fitted under the variance of the inputs."""
        diagonal = np.einsum("gkk->gk", covariance)
        diagonal = diagonal + _DAMPING * np.maximum(diagonal.mean(axis=1, keepdims=True), _TINY)
        blocks = self.blocks.cut(self.rows)
        importance = self.blocks.join(np.broadcast_to(diagonal[:, None, :], blocks.shape))
        if self.block:
            return {b: quantize_blocks(self.rows, b, self.limit, self.block, importance) for b in widths}
        return {b: quantize_rows(self.rows, b, self.limit, self.least_scale, importance, self.grid) for b in widths}

    def codes(self, second: Float, damping: float, starts: Mapping[int, WeightCodes]) -> dict[int, WeightCodes]:
        """Round with error compensation under a second moment, at each width and scales around those of `starts`."""
        return self.rounded(Compensator.of(second, damping), starts) if any(starts) else dict(starts)

    def rounded(self, compensator: Compensator, starts: Mapping[int, WeightCodes]) -> dict[int, WeightCodes]:
        """Round as `codes` does, by a compensator that other rows of the layer share."""
        trials = {b: _Trials.around(c.scales, *self._window(b)) for b, c in starts.items() if b}
        if not trials:
            return dict(starts)
        floor = scale_floor(self.rows, self.least_scale)
        trials = {b: replace(t, scales=self._stored(t.scales, floor)) for b, t in trials.items()}
        rounding = _Compensated(self.blocks, self.rows.astype(np.float32), compensator, self.block)
        integers, scales = rounding.best(list(trials.values()))
        if not self.block:
            scales = rounding.refitted(integers, scales, floor)
        else:
            scales = rounding.refitted_blocks(integers, scales)
        each = zip(trials, integers.swapaxes(0, 1), scales.swapaxes(0, 1), strict=True)
        codes = {b: WeightCodes(q, s.astype(np.float32)) for b, q, s in each}
        if not self.block:
            codes = {b: on_grid(c, self.grid, b, self.limit, floor) for b, c in codes.items()}
        return {**starts, **codes}

    def _window(self, bits: int) -> tuple[Float, Float]:
        if not self.block:
            return window(self.rows, bits, self.limit)
        low, high = (np.full(len(self.rows), bound) for bound in block_window(bits, self.limit))
        return low, high

    def _stored(self, scales: Float, floor: Float) -> Float:
        """Return trial scales [units, T] or, of blocks, [units, T, B], as a file holds them."""
        return halved(scales) if self.block else stored(np.maximum(scales, floor[:, None]))


@dataclass(frozen=True)
class _Trials:
    """Trial scales of each row at one width, [units, T] or [units, T, B], with the bounds of the integers [units, T].

    A trial multiplies the scales of all blocks of a row by the same factor.
    """

    scales: Float
    low: Float
    high: Float

    @classmethod
    def around(cls, scales: NDArray[np.float32], low: Float, high: Float) -> "_Trials":
        factors = np.array(_TRIALS if high.max() - low.min() < _FINE_LEVELS else _FINE_TRIALS)
        shape = len(low), len(factors)
        tried = scales[:, None] * factors.reshape(-1, *[1] * (scales.ndim - 1))
        return cls(tried, *(np.broadcast_to(bound[:, None], shape) for bound in (low, high)))


@dataclass(frozen=True)
class _Compensated:
    """Rounding of `rows` [units, K] by a compensator. block: as in LayerRows."""

    blocks: Blocks
    rows: NDArray[np.float32]
    compensator: Compensator
    block: int

    def best(self, widths: Sequence[_Trials]) -> tuple[NDArray[np.int8], Float]:
        """Return, for each width, the trial of each row with the least error on the layer's output.

        integers [units, W, K], scales [units, W] or [units, W, B].
        """
        blocks, rows = self.blocks, self.rows
        tried, low, high = (np.concatenate([getattr(w, n) for w in widths], axis=1) for n in ("scales", "low", "high"))
        ends, count = np.cumsum([w.low.shape[1] for w in widths]), low.shape[1]
        integers = np.empty((len(rows), len(widths), rows.shape[1]), np.int8)
        picks = np.empty((len(rows), len(widths)), np.int64)
        # With one group, any subset of rows can be cut into blocks separately.
        size = max(1, _TRIED_AT_ONCE // count) if blocks.single else len(rows)
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            least, greatest = (blocks.spread(v[part]).astype(np.float32) for v in (low, high))
            scales = self._spread(tried[part]).astype(np.float32)
            q, loss = self.compensator.round(blocks.cut(rows[part]), scales, least, greatest, self._columns)
            for w, losses in enumerate(np.split(blocks.gather(loss, count), ends[:-1], axis=1)):
                picks[part, w] = losses.argmin(axis=1) + ends[w] - losses.shape[1]
            best = blocks.spread(picks[part]).reshape(len(q), 1, -1, len(widths))
            kept = np.take_along_axis(q.swapaxes(1, 2).reshape(*q.shape[::2], -1, count), best, axis=3)
            for w in range(len(widths)):
                integers[part, w] = blocks.join(kept[..., w].swapaxes(1, 2))
        return integers, np.take_along_axis(tried, picks.reshape(*picks.shape, *[1] * (tried.ndim - 2)), axis=1)

    @cached_property
    def _columns(self) -> NDArray[np.int64] | None:
        """The block of scales of each weight, [parts, K], if there are any."""
        if not self.block:
            return None
        return self.blocks.cut(np.arange(self.rows.shape[1])[None] // self.block)[:, 0]

    def _spread(self, scales: Float) -> Float:
        """Lay out scales as `Compensator.round` takes them."""
        if scales.ndim == 2:
            return self.blocks.spread(scales)
        return np.repeat(np.moveaxis(scales, 2, 0).reshape(1, scales.shape[2], -1), self.blocks.parts, axis=0)

    def refitted(self, integers: NDArray[np.int8], scales: Float, floor: Float) -> Float:
        """Return the scales [units, W] of least error for integers [units, W, K]."""
        blocks, count = self.blocks, integers.shape[1]
        if blocks.parts > 1 or blocks.shared:
            return scales
        grouped = integers.reshape(blocks.linear.group, -1, integers.shape[2])
        weights = np.repeat(blocks.cut(self.rows), count, axis=1)
        least = blocks.spread(np.broadcast_to(floor[:, None], scales.shape))
        refitted = self.compensator.refit(weights, grouped, blocks.spread(scales), least)
        return stored(blocks.gather(refitted, count))

    def refitted_blocks(self, integers: NDArray[np.int8], scales: Float) -> Float:
        """Return the scales [units, W, B] of least error for integers [units, W, K]."""
        if self.blocks.parts > 1:
            return scales
        refit = self.compensator.refit_blocks
        return np.stack([refit(self.rows, integers[:, w], scales[:, w]) for w in range(scales.shape[1])], axis=1)
