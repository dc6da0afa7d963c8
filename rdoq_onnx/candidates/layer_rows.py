"""Rounding of one layer: scales are searched together with error-compensated rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.candidates.quantizer import on_grid, quantize_rows, scale_floor, window
from rdoq_onnx.model.codes import WeightCodes, stored
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

    limit: bound on the integers' magnitude. least_scale [units]: lower bound on scales.
    """

    blocks: Blocks
    rows: Rows
    limit: int
    least_scale: Float | None

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
        return {b: quantize_rows(self.rows, b, self.limit, self.least_scale, importance, self.grid) for b in widths}

    def codes(self, second: Float, damping: float, starts: Mapping[int, WeightCodes]) -> dict[int, WeightCodes]:
        """Round with error compensation under a second moment, at each width and scales around those of `starts`."""
        return self.rounded(Compensator.of(second, damping), starts) if any(starts) else dict(starts)

    def rounded(self, compensator: Compensator, starts: Mapping[int, WeightCodes]) -> dict[int, WeightCodes]:
        """Round as `codes` does, by a compensator that other rows of the layer share."""
        trials = {b: _Trials.around(c.scales, *window(self.rows, b, self.limit)) for b, c in starts.items() if b}
        if not trials:
            return dict(starts)
        floor = scale_floor(self.rows, self.least_scale)
        codes = _compensated(self.blocks, self.rows.astype(np.float32), compensator, list(trials.values()), floor)
        kept = (on_grid(c, self.grid, b, self.limit, floor) for b, c in zip(trials, codes, strict=True))
        return {**starts, **dict(zip(trials, kept, strict=True))}


@dataclass(frozen=True)
class _Trials:
    """Trial scales of each row at one width, [units, T], with the bounds of the integers."""

    scales: Float
    low: Float
    high: Float

    @classmethod
    def around(cls, scales: NDArray[np.float32], low: Float, high: Float) -> "_Trials":
        factors = np.array(_TRIALS if high.max() - low.min() < _FINE_LEVELS else _FINE_TRIALS)
        tried = scales[:, None] * factors
        return cls(tried, *(np.broadcast_to(bound[:, None], tried.shape) for bound in (low, high)))


def _compensated(
    blocks: Blocks, rows: NDArray[np.float32], compensator: Compensator, widths: Sequence[_Trials], floor: Float
) -> list[WeightCodes]:
    """Return, for each width, the trial of each row with the least error on the layer's output."""
    low, high = (np.concatenate([getattr(w, name) for w in widths], axis=1) for name in ("low", "high"))
    tried = stored(np.maximum(np.concatenate([w.scales for w in widths], axis=1), floor[:, None]))
    ends = np.cumsum([w.scales.shape[1] for w in widths])
    integers = np.empty((len(rows), len(widths), rows.shape[1]), np.int8)
    picks = np.empty((len(rows), len(widths)), np.int64)
    # With one group, any subset of rows can be cut into blocks separately.
    size = max(1, _TRIED_AT_ONCE // tried.shape[1]) if blocks.single else len(rows)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        bounds = (blocks.spread(v[part]).astype(np.float32) for v in (tried, low, high))
        q, loss = compensator.round(blocks.cut(rows[part]), *bounds)
        for w, losses in enumerate(np.split(blocks.gather(loss, tried.shape[1]), ends[:-1], axis=1)):
            picks[part, w] = losses.argmin(axis=1) + ends[w] - losses.shape[1]
        best = blocks.spread(picks[part]).reshape(len(q), 1, -1, len(widths))
        kept = np.take_along_axis(q.swapaxes(1, 2).reshape(*q.shape[::2], -1, tried.shape[1]), best, axis=3)
        for w in range(len(widths)):
            integers[part, w] = blocks.join(kept[..., w].swapaxes(1, 2))
    scales = np.take_along_axis(tried, picks, axis=1)
    if blocks.parts == 1 and not blocks.shared:
        scales = _refitted(blocks, rows, integers, compensator, scales, floor)
    return [WeightCodes(q, s.astype(np.float32)) for q, s in zip(integers.swapaxes(0, 1), scales.T, strict=True)]


def _refitted(
    blocks: Blocks,
    rows: NDArray[np.float32],
    integers: NDArray[np.int8],
    compensator: Compensator,
    scales: Float,
    floor: Float,
) -> Float:
    """Return the scales [units, W] of least error for integers [units, W, K]."""
    count = integers.shape[1]
    grouped = integers.reshape(blocks.linear.group, -1, integers.shape[2])
    weights = np.repeat(blocks.cut(rows), count, axis=1)
    least = blocks.spread(np.broadcast_to(floor[:, None], scales.shape))
    refitted = compensator.refit(weights, grouped, blocks.spread(scales), least)
    return stored(blocks.gather(refitted, count))
