"""Error-compensated rounding: each weight's rounding error is made up for by the weights still to be rounded.

The error that a channel w leaves on the layer's output, bias corrected, is

    E[(wᵀx - ŵᵀx)²] = (w - ŵ)ᵀ H (w - ŵ),    H = Cov(x) + damping

(OBQ; GPTQ, Frantar et al., ICLR 2023). With Uᵀ U = H⁻¹, U upper triangular, the weights are rounded one after another;
the error e_k = (w_k - ŵ_k) / U_kk is spread over the rest, w_j -= e_k U_kj for j > k, and Σ e_k² is the error above.
All channels, widths and trial scales of a layer are rows of one matrix; columns go in blocks, so that almost all the
work is matrix products. Inputs of large variance go first, while there is most left to compensate with.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
_BLOCK = 32


@dataclass(frozen=True)
class Compensator:
    """A layer's damped covariance, factored. hessian, factor [G, K, K]; order [G, K], the columns' order."""

    hessian: Float
    factor: Float
    order: NDArray[np.int64]

    @classmethod
    def of(cls, covariance: Float, damping: float) -> "Compensator":
        """covariance [G, K, K] of the layer's inputs; damping as a share of its mean diagonal.

        Inputs that never vary and covariances without full rank are carried by the damping.
        """
        count = covariance.shape[-1]
        diagonal = np.einsum("gkk->gk", covariance)
        level = diagonal.mean(axis=1)
        level = np.where(level > 0, level, 1.0)
        hessian = covariance + (damping * level)[:, None, None] * np.eye(count)
        order = np.argsort(-diagonal, axis=1, kind="stable")
        rows = np.arange(len(order))[:, None, None]
        sorted_hessian = hessian[rows, order[:, :, None], order[:, None, :]]
        inverse = np.linalg.inv(sorted_hessian)
        factor = np.swapaxes(np.linalg.cholesky((inverse + np.swapaxes(inverse, 1, 2)) / 2), 1, 2)
        return cls(hessian, np.ascontiguousarray(factor), order)

    def round(self, weights: Float, scales: Float, low: Float, high: Float) -> tuple[Float, Float]:
        """Round rows of weights [G, R, K] at `scales` to integers low..high, [G, R] each.

        Returns integers [G, R, K] and the error of each row [G, R].
        """
        left = np.ascontiguousarray(np.take_along_axis(weights, self.order[:, None, :], axis=2).swapaxes(1, 2))
        integers = np.empty_like(left)
        loss = np.zeros_like(scales)
        count = left.shape[1]
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            errors = np.empty((len(left), stop - start, left.shape[2]))
            for k in range(start, stop):
                column, pivot = left[:, k], self.factor[:, k, k, None]
                q = np.clip(np.rint(column / scales), low, high)
                error = (column - q * scales) / pivot
                integers[:, k], errors[:, k - start] = q, error
                loss += error * error
                left[:, k + 1 : stop] -= self.factor[:, k, k + 1 : stop, None] * error[:, None]
            if stop < count:
                left[:, stop:] -= np.swapaxes(self.factor[:, start:stop, stop:], 1, 2) @ errors
        result = np.empty_like(integers)
        np.put_along_axis(result, self.order[:, :, None], integers, axis=1)
        return result.swapaxes(1, 2), loss

    def refit(self, weights: Float, integers: Float, scales: Float, floor: Float) -> Float:
        """The scale of least error for given integers: qᵀ H w / qᵀ H q. Shapes as for `round`."""
        weighted = integers @ self.hessian
        power = (weighted * integers).sum(axis=2)
        product = (weighted * weights).sum(axis=2)
        usable = (power > 0) & (product > 0)
        return np.maximum(np.where(usable, product / np.where(usable, power, 1.0), scales), floor)
