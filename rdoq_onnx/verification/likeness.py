"""How like the held-out samples are to those seen: figures of samples too alike promise nothing for others.

    ℓ = mean_i min_j d_ij² / mean_ij d_ij²,    d_ij the distance of the float outputs of held-out i and seen j.

In many dimensions independent samples of a wide source lie about as far from the nearest as from any other, ℓ near 1.
Outputs of fewer elements than samples are near one another anyway.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.refinement.judge import FLOAT_MEMORY, JUDGING, float_outputs
from rdoq_onnx.refinement.reference import Reference


def likeness(reference: Reference, seen: Samples) -> float | None:
    """Return ℓ; None where it says nothing: few elements, samples of different shapes, or too large outputs."""
    measurement, runtime = reference.measurement, reference.runtime
    metric, size = measurement.observation.metric, measurement.observation.batching.size
    some = seen.some(JUDGING)
    fits = 16 * metric.elements * (len(some) + len(reference.samples)) <= FLOAT_MEMORY
    if metric.vary or metric.elements < len(some) or not fits or not len(reference.samples):
        return None
    held_out = np.concatenate([_rows(b.aimed, metric.weights, b.count) for b in reference.batches()])
    batches = zip(
        some.counted_batches(size), float_outputs(measurement.aimed.model, some, metric, runtime, size), strict=True
    )
    others = np.concatenate([_rows(values, metric.weights, count) for (count, _), values in batches])
    squares = np.square(held_out).sum(axis=1)[:, None] + np.square(others).sum(axis=1) - 2 * held_out @ others.T
    mean = float(squares.mean())
    return float(np.maximum(squares, 0).min(axis=1).mean()) / mean if mean > 0 else None


def _rows(values: tuple[NDArray[Any], ...], weights: tuple[float, ...], count: int) -> NDArray[np.float64]:
    """Return all outputs of `count` samples as rows, weighed as in the metric."""
    pairs = zip(values, weights, strict=True)
    return np.concatenate([w * np.asarray(v, np.float64).reshape(count, -1) for v, w in pairs], axis=1)
