"""Error-compensated rounding: weights not yet rounded compensate the error of those already rounded.

The error of a channel w on the layer's output, after bias correction, is

    E[(wᵀx - ŵᵀx)²] = (w - ŵ)ᵀ H (w - ŵ),    H = Cov(x) + damping

(OBQ; GPTQ, Frantar et al., ICLR 2023). With Uᵀ U = H⁻¹, U upper triangular, weights are rounded one after another; the
error e_k = w_k - ŵ_k is spread over the rest, w_j -= e_k U_kj / U_kk for j > k, and Σ (e_k / U_kk)² is the error above.
All channels, widths and trial scales of a layer are rows of one matrix; one matrix product carries the errors of all
earlier columns into a block. Inputs of large variance go first, while most weights are left to compensate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import halved

Float = NDArray[np.float64]
Rows = NDArray[np.floating[Any]]
_BLOCK = 32
_RIDGE = 1e-6  # relative, of the normal equations of blocks


@dataclass(frozen=True)
class Compensator:
    """The factored, damped covariance of a layer. hessian, factor [G, K, K]; order [G, K] of the columns."""

    hessian: Float
    factor: Float
    order: NDArray[np.int64]

    @classmethod
    def of(cls, covariance: Float, damping: float) -> "Compensator":
        """Factor the covariance [G, K, K] of a layer's inputs, with damping as a share of its mean diagonal.

        Damping suffices for constant inputs and covariances without full rank. A covariance left indefinite by float
        rounding, as when inputs vary by a thousandth of their mean, gets as much more as it needs.
        """
        count = covariance.shape[-1]
        diagonal = np.einsum("gkk->gk", covariance)
        level = diagonal.mean(axis=1)
        level = np.where(level > 0, level, 1.0)
        hessian = covariance + (damping * level)[:, None, None] * np.eye(count)
        order = np.argsort(-diagonal, axis=1, kind="stable")
        try:
            return cls(hessian, _factored(hessian, order), order)
        except np.linalg.LinAlgError:
            values = np.linalg.eigvalsh(hessian)
            lowest, greatest = values[:, 0], np.abs(values).max(axis=1)
            missing = np.where(lowest < damping * level / 2, damping * greatest - lowest, 0.0)
            hessian += missing[:, None, None] * np.eye(count)
            return cls(hessian, _factored(hessian, order), order)

    def round(
        self, weights: Rows, scales: Rows, low: Rows, high: Rows, columns: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int8], Float]:
        """Round rows of weights [G, R, K] to integers low..high, in the precision of `weights`.

        scales, low, high [G, R·T]: T consecutive trials per row. With scales [G, B, R·T] a weight takes that of its
        block, columns [G, K].
        Returns integers [G, R·T, K] and the error of each trial [G, R·T].
        """
        trials = low.shape[1] // weights.shape[1]
        ordered = np.take_along_axis(weights, self.order[:, None, :], axis=2).swapaxes(1, 2)
        pivots = np.einsum("gkk->gk", self.factor)
        spread = (self.factor / pivots[:, :, None]).astype(weights.dtype)
        if len(self.order) > 1 and weights.shape[2] <= _BLOCK:
            return self._round_groups(ordered, trials, spread, pivots, (scales, low, high))
        integers = np.empty((len(self.order), weights.shape[2], low.shape[1]), np.int8)
        loss = np.empty(low.shape)
        for g, order in enumerate(self.order):
            of_blocks = scales[g] if columns is not None else scales[g, None]
            which = np.zeros(len(order), np.int64) if columns is None else columns[g, order]
            rounded, errors = _round(ordered[g], trials, spread[g], (of_blocks, low[g], high[g]), which.tolist())
            integers[g, order] = rounded
            loss[g] = _weighted_squares(errors, pivots[g])
        return integers.swapaxes(1, 2), loss

    def _round_groups(
        self, ordered: Rows, trials: int, spread: Rows, pivots: Float, bounds: tuple[Rows, Rows, Rows]
    ) -> tuple[NDArray[np.int8], Float]:
        """Round many small groups at once, as in a depthwise convolution, with groups along the last axis."""
        scales, low, high = (np.ascontiguousarray(b.T) for b in bounds)
        weights, factor, one = ordered.transpose(1, 2, 0), spread.transpose(1, 2, 0), [0] * ordered.shape[1]
        rounded, errors = _round(weights, trials, factor, (scales[None], low, high), one)
        integers = np.empty(rounded.shape, np.int8)
        np.put_along_axis(integers, self.order.T[:, None, :], rounded, axis=0)
        loss = np.einsum("krg,krg,kg->gr", errors, errors, 1 / pivots.T**2)
        return integers.transpose(2, 1, 0), loss

    def refit(self, weights: Rows, integers: NDArray[np.number[Any]], scales: Float, floor: Float) -> Float:
        """Return the scales of least error for `integers`, qᵀ H w / qᵀ H q; shapes as in `round` at one trial."""
        weighted = integers.astype(weights.dtype) @ self.hessian.astype(weights.dtype)
        power = (weighted * integers).sum(axis=2)
        product = (weighted * weights).sum(axis=2)
        usable = (power > 0) & (product > 0)
        return np.maximum(np.where(usable, product / np.where(usable, power, 1.0), scales), floor)

    def refit_blocks(self, weights: Rows, integers: NDArray[np.int8], scales: Float) -> Float:
        """Return the scales [R, B] of blocks that have the least error together, the solution of

            Σ_c (q_bᵀ H_bc q_c) s_c = q_bᵀ H_b w      for each block b

        weights [R, K], of a layer with one group; rows that do not gain keep their `scales`.
        """
        (hessian,), (rows, count) = self.hessian.astype(weights.dtype), scales.shape
        blocks = integers.reshape(rows, count, -1).astype(weights.dtype)
        size = blocks.shape[2]
        matrix = np.empty((rows, count, count))
        for c in range(count):
            image = blocks[:, c] @ hessian[c * size : (c + 1) * size]
            matrix[:, c] = np.einsum("rbk,rbk->rb", image.reshape(blocks.shape), blocks)
        right = np.einsum("rbk,rbk->rb", (weights @ hessian).reshape(blocks.shape), blocks).astype(np.float64)
        # A block of zeros has no scale of its own; it keeps the one it has.
        index = np.arange(count)
        power = matrix[:, index, index]
        empty = power <= 0
        matrix[:, index, index] = np.where(empty, 1.0, power * (1 + _RIDGE))
        found = halved(np.linalg.solve(matrix, np.where(empty, scales, right)[..., None])[..., 0])
        matrix[:, index, index] = power

        def error(s: Float) -> Float:
            quadratic: Float = np.einsum("rb,rbc,rc->r", s, matrix, s) - 2 * np.einsum("rb,rb->r", s, right)
            return quadratic

        result: Float = np.where((error(found) < error(scales))[:, None], found, scales)
        return result


def _round(
    ordered: Rows, trials: int, spread: Rows, bounds: tuple[Rows, Rows, Rows], which: Sequence[int]
) -> tuple[NDArray[np.int8], Rows]:
    """Return integers and errors w - ŵ of weights [K, R] with factors [K, K]; all may have a last axis of groups.

    bounds: scales of the B blocks [B, R·T], least and greatest integers [R·T]. which: the block of each weight.
    """
    (scales, low, high), count = bounds, len(ordered)
    inverses = 1 / scales
    errors = np.empty((count, *low.shape), ordered.dtype)
    integers = np.empty(errors.shape, np.int8)
    q = np.empty_like(low)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        block = np.repeat(ordered[start:stop], trials, axis=1)
        if start:
            block -= spread[:start, start:stop].T @ errors[:start]
        for k in range(start, stop):
            column = block[k - start]
            if k > start:
                column -= _carried(spread[start:k, k], errors[start:k])
            np.multiply(column, inverses[which[k]], out=q)
            np.rint(q, out=q)
            np.maximum(q, low, out=q)
            np.minimum(q, high, out=q)
            integers[k] = q
            np.multiply(q, scales[which[k]], out=q)
            np.subtract(column, q, out=errors[k])
    return integers, errors


def _carried(spread: Rows, errors: Rows) -> Rows:
    """Return the error that earlier columns carry into one column."""
    return spread @ errors if spread.ndim == 1 else np.einsum("kg,krg->rg", spread, errors)


def _factored(hessian: Float, order: NDArray[np.int64]) -> Float:
    """Return the upper Cholesky factor of the inverse, [G, K, K], in `order`. Raises LinAlgError if there is none."""
    rows = np.arange(len(order))[:, None, None]
    inverse = np.linalg.inv(hessian[rows, order[:, :, None], order[:, None, :]])
    factor = np.swapaxes(np.linalg.cholesky((inverse + np.swapaxes(inverse, 1, 2)) / 2), 1, 2)
    return np.ascontiguousarray(factor)


def _weighted_squares(errors: Rows, pivots: Float) -> Float:
    """Return Σ e² over K, [R], where e is errors [K, R] / pivots [K]."""
    total = np.zeros(errors.shape[1])
    for start in range(0, len(errors), _BLOCK):
        part = slice(start, start + _BLOCK)
        total += pivots[part] ** -2.0 @ np.square(errors[part], dtype=np.float64)
    return total
