"""An allocation as it was emitted and judged, and how two of them compare."""

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.refinement.diversion import MEASURED, Diverted
from rdoq_onnx.refinement.judge import Judge

SURE = 2.0  # standard errors that a trial among many must gain
_ENOUGH = 0.998  # share of the distortion that a trial must get below; smaller gains are noise


@dataclass(frozen=True)
class Trial:
    """An allocation, its quantized model, and that model's errors on the judging samples, [samples, parts].

    guarded: the same by the judge's guard, [samples].
    """

    allocation: Allocation
    model: onnx.ModelProto
    errors: NDArray[np.float64]
    guarded: NDArray[np.float64]

    @classmethod
    def of(cls, allocation: Allocation, judge: Judge) -> "Trial":
        model = quantized_model(allocation)
        return cls(allocation, model, *judge.judged(model))

    @property
    def distortion(self) -> float:
        return float(self.errors.sum(axis=1).mean())


def better(before: Trial, after: Trial, sure: float = 0.0) -> bool:
    """Tell whether `after` lowers the distortion by at least `sure` standard errors, and the guard's at all."""
    gains = (before.errors - after.errors).sum(axis=1)
    gained = before.distortion - after.distortion >= sure * gains.std() / len(gains) ** 0.5
    lower = after.distortion < _ENOUGH * before.distortion
    return bool(lower and gained and after.guarded.mean() <= before.guarded.mean())


def tolerable(before: Trial, after: Trial) -> bool:
    """Tell whether the guard's distortion of `after` rises within its noise at most; single samples dominate it."""
    return not significantly_worse(after.guarded[:, None], before.guarded[:, None])


def significantly_worse(errors: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Tell whether a part's `errors` [samples, parts] exceed `others` by more than twice the standard error."""
    losses = errors - others
    return bool((losses.mean(axis=0) > SURE * losses.std(axis=0) / len(losses) ** 0.5).any())


def surely_diverted(before: Trial, after: Trial) -> Diverted | None:
    """Tell what `after` gains in divergence; None if that is within the noise, or costs too much squared error."""
    gains = before.guarded - after.guarded
    cost = float(10 * np.log10(max(after.distortion, 1e-300) / max(before.distortion, 1e-300)))
    if gains.mean() <= SURE * gains.std() / len(gains) ** 0.5 or cost > MEASURED:
        return None
    return Diverted(float(before.guarded.mean()), float(after.guarded.mean()), cost)
