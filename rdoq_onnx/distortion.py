"""The distortion of a network's outputs (Eq. 7 and 8): δ = E_x ‖F̃(perturbed) - F(x)‖² / D.

D is the number of output elements of one sample. With several outputs each is first divided by its root mean square
over the calibration samples, so that none drowns the others. Outputs that are not floating point are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.errors import CalibrationError

Array = NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """outputs: names of the outputs that count; weights: what each is multiplied by; elements: D."""

    outputs: tuple[str, ...]
    weights: tuple[float, ...]
    elements: int

    def errors(self, values: Sequence[Array], reference: Sequence[Array], samples: int) -> NDArray[np.float64]:
        """‖values - reference‖² / D of each sample, [samples]; axis 0 of every output runs over the samples."""
        total = np.zeros(samples)
        for value, target, weight in zip(values, reference, self.weights, strict=True):
            difference = (value.astype(np.float64) - target) * weight
            total += np.square(difference).reshape(samples, -1).sum(axis=1)
        return total / self.elements


def metric_of(names: Sequence[str], outputs: Sequence[Sequence[Array]], samples: int) -> Metric:
    """The metric of a network from what it gave: `outputs[batch][output]`, `samples` in all.

    Raises CalibrationError if there is no floating-point output to compare, or one is not finite.
    """
    floating = [k for k, value in enumerate(outputs[0]) if np.asarray(value).dtype.kind == "f"]
    if not floating:
        raise CalibrationError("the model has no floating-point output, so there is no distortion to measure")
    weights, elements = [], 0
    for k in floating:
        power = sum(float(np.square(batch[k].astype(np.float64)).sum()) for batch in outputs)
        count = sum(batch[k].size for batch in outputs)
        if not np.isfinite(power):
            raise CalibrationError(f"output {names[k]!r} of the float model is not finite on the samples given")
        rms = (power / max(count, 1)) ** 0.5
        weights.append(1.0 / rms if len(floating) > 1 and rms > 0 else 1.0)
        elements += count // samples
    return Metric(tuple(names[k] for k in floating), tuple(weights), elements)


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10 of signal power over noise power, in dB; infinite where there is no noise."""
    if noise <= 0:
        return float("inf")
    return float(10 * np.log10(max(signal, 1e-300) / noise))
