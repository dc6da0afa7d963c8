"""Measure the distortion of a quantized network on the judging samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.system.runtime import Runtime

Float = NDArray[np.float64]

JUDGING = 128  # samples that refinement measures on
FLOAT_MEMORY = 1 << 27  # bytes of inputs, and of float outputs, kept in memory by refinement or verification


@dataclass(frozen=True)
class Judge:
    """Compares emitted models with the float outputs `expected` on `samples`, in batches of `size`.

    guard: a second metric, which must not rise when the first one falls; None for none.
    """

    samples: Samples
    size: int
    expected: tuple[tuple[NDArray[Any], ...], ...]
    metric: Metric
    runtime: Runtime
    guard: Metric | None = None

    @classmethod
    def of(cls, measurement: Measurement, samples: Samples, runtime: Runtime, steps: Steps) -> "Judge":
        """Make a judge on as many of `samples` as fit in memory; `steps` keeps the float outputs."""
        metric, size = measurement.observation.metric, measurement.observation.batching.size
        judged = samples.some(min(JUDGING, max(1, FLOAT_MEMORY // (4 * metric.elements)))).loaded(FLOAT_MEMORY)
        reference = measurement.aimed.model
        expected = steps.once("outputs, judging", lambda: float_outputs(reference, judged, metric, runtime, size))
        return cls(judged, size, expected, metric, runtime)

    def errors(self, model: onnx.ModelProto) -> Float:
        """Return the contribution of each sample and part to δ of a quantized model, [samples, parts]."""
        return self.judged(model)[0]

    def judged(self, model: onnx.ModelProto) -> tuple[Float, Float]:
        """Return `errors` of a quantized model, and the same of the guard, [samples], zeros without one."""
        session = self.runtime.session(with_outputs(model, self.metric.outputs), "all")
        errors, guarded = [], []
        for (count, feeds), floats in zip(self.samples.counted_batches(self.size), self.expected, strict=True):
            values = session.run(feeds, self.metric.outputs)
            errors.append(self.metric.part_errors(values, floats, count))
            guarded.append(np.zeros(count) if self.guard is None else self.guard.errors(values, floats, count))
        return np.concatenate(errors), np.concatenate(guarded)

    def distortion(self, allocation: Allocation) -> float:
        """Measure δ of the emitted model."""
        return float(self.errors(quantized_model(allocation)).sum(axis=1).mean())


def float_outputs(
    model: onnx.ModelProto, samples: Samples, metric: Metric, runtime: Runtime, size: int
) -> tuple[tuple[NDArray[Any], ...], ...]:
    """Return the measured outputs of the float `model` for each batch of `size`."""
    session = runtime.session(model, "all")
    return tuple(tuple(session.run(feeds, metric.outputs)) for feeds in samples.batches(size))
