"""Distortion of a network's outputs (Eq. 7 and 8): δ = E_x ‖F̃(perturbed) - F(x)‖² / D.

D is the number of output elements per sample. Each of several outputs is first divided by its root mean square over
the calibration samples, so that none dominates. Outputs that are not floating point are ignored.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.errors import CalibrationError

Array = NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """How outputs are compared.

    outputs: names of the compared outputs. weights: factor of each. elements: D. power: E‖y‖² / D of the weighted
    outputs, i.e. the δ at 0 dB; 1 if all outputs are 0.
    """

    outputs: tuple[str, ...]
    weights: tuple[float, ...]
    elements: int
    power: float

    def errors(self, values: Sequence[Array], reference: Sequence[Array], samples: int) -> NDArray[np.float64]:
        """Return ‖values - reference‖² / D of each sample, [samples]; axis 0 of every output runs over the samples."""
        total = np.zeros(samples)
        for value, expected, weight in zip(values, reference, self.weights, strict=True):
            difference = (value.astype(np.float64) - expected) * weight
            total += np.square(difference).reshape(samples, -1).sum(axis=1)
        return total / self.elements


def metric_of(names: Sequence[str], batches: Iterable[Sequence[Array]], samples: int) -> Metric:
    """Build the metric from a network's outputs on each of `batches`, `samples` in total.

    Raises CalibrationError if there is no floating-point output to compare, or one is not finite.
    """
    power, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    floating: list[str] = []
    for outputs in batches:
        floating = [name for name, value in zip(names, outputs, strict=True) if np.asarray(value).dtype.kind == "f"]
        for name, value in zip(names, outputs, strict=True):
            if name in floating:
                power[name] += float(np.square(value.astype(np.float64)).sum())
                count[name] += value.size
    if not floating:
        raise CalibrationError(
            "the model has no floating-point output, so there is no distortion to measure; "
            "export it with its scores as an output (scikit-learn: zipmap=False)"
        )
    weights = []
    for name in floating:
        if not np.isfinite(power[name]):
            raise CalibrationError(f"output {name!r} of the float model is not finite on the given samples")
        rms = (power[name] / max(count[name], 1)) ** 0.5
        weights.append(1.0 / rms if len(floating) > 1 and rms > 0 else 1.0)
    elements = sum(count[name] // samples for name in floating)
    total = sum(power[name] * weight**2 for name, weight in zip(floating, weights, strict=True))
    return Metric(tuple(floating), tuple(weights), elements, total / max(samples * elements, 1) or 1.0)


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 log10 of signal power over noise power, in dB; infinite without noise."""
    if noise <= 0:
        return float("inf")
    return float(10 * np.log10(max(signal, 1e-300) / noise))
