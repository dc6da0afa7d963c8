"""Divert bits towards the divergence of rows of logits, as far as the squared error hardly suffers.

At the least squared error a small move costs it little, but may lower the divergence by much. So each row of the curves
is weighed by a mix of its shares of both at its width,

    w = 1 - t + t r,    r = ρ Σ δ / Σ ρ δ,    ρ = δ_kl / δ (curves/divergence.py),

with the greatest t at which the predicted squared error grows by no more than `PREDICTED` dB.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.config import Budgets

PREDICTED = 0.2  # dB that the predicted squared error may grow by
MEASURED = 0.3  # dB that the measured one may
_STEPS = 6  # bisections of t

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Diverted:
    """The mean divergence, in nats a row, before and after bits were diverted, and the dB of SQNR that this cost."""

    before: float
    after: float
    cost_db: float


def diverted(allocation: Allocation, divergence: Float, budgets: Budgets) -> tuple[Allocation, Float]:
    """Return `allocation`, of least squared error, with bits diverted, and the weights of the rows that led there."""
    ratios = _ratios(allocation, divergence)
    limit = allocation.predicted * 10 ** (PREDICTED / 10)
    best, weigh = allocation, np.ones(len(ratios))
    low, high = 0.0, 1.0
    for step in range(_STEPS):
        mix = (low + high) / 2 if step else high
        tried = 1 - mix + mix * ratios
        found = allocate_bits(allocation.measurement, budgets, tried, allocation.bound)
        if found.predicted <= limit:
            best, weigh, low = found, tried, mix
        else:
            high = mix
        if low == 1.0:
            break
    return best, weigh


def predicted_divergence(allocation: Allocation) -> float | None:
    """Return the divergence that the curves predict, in nats a row; None if there are no curves of it."""
    measurement = allocation.measurement
    if measurement.observation.metric.name == "kl":
        return allocation.predicted
    if measurement.divergence is None:
        return None
    return float((_filled(measurement.divergence) * allocation.distortions).sum())


def _ratios(allocation: Allocation, divergence: Float) -> Float:
    """Return r of each row."""
    known, own = _filled(divergence), allocation.distortions
    total = float((known * own).sum())
    return known * own.sum() / total if total > 0 else np.ones(len(known))


def _filled(divergence: Float) -> Float:
    """Return ρ of each row, their geometric mean where it is not known."""
    known = np.isfinite(divergence) & (divergence > 0)
    mean = float(np.exp(np.log(divergence[known]).mean())) if known.any() else 1.0
    return np.where(known, divergence, mean)
