"""Verify the emitted model on held-out samples, which no measurement has used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.checkpoint import Binding, Steps
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.emission.tensorrt_rules import violations
from rdoq_onnx.errors import ModelError, VerificationError
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.model.sizes import model_bytes
from rdoq_onnx.observation.distortion import sqnr_db
from rdoq_onnx.refinement.judge import FLOAT_MEMORY
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.targets import COMPLETE, Target
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, check_agreement
from rdoq_onnx.verification.kernels import float_layers, kernel_counts
from rdoq_onnx.verification.runs import (
    LEVELS,
    FloatRuns,
    Run,
    batch_powers,
    float_runs,
    floating,
    onnxruntime_runs,
    openvino_runs,
)
from rdoq_onnx.verification.widths import check_widths

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Verification:
    """Measurements of the emitted model on the held-out samples.

    measured: δ, in the unit of the predicted one. sqnr_db: signal over noise of all float outputs. level_gap: δ between
    ONNX Runtime's BASIC and default optimization levels. kernels: node counts of the graph that the default level
    optimizes to. float_layers: nodes of quantized layers that the default level runs in float, with the reason.
    samples: number of samples.
    """

    measured: float
    sqnr_db: float
    level_gap: float
    kernels: Mapping[str, int]
    float_layers: Mapping[str, str]
    samples: int


@dataclass(frozen=True)
class Reference:
    """The float model `original` on `samples`, in `runtime`, that emitted models are compared with.

    floats: the `float_runs`, the same for all budgets; None if they are too large to keep.
    """

    original: onnx.ModelProto
    samples: Samples
    runtime: Runtime
    floats: FloatRuns | None = None

    @classmethod
    def of(
        cls, original: onnx.ModelProto, measurement: Measurement, samples: Samples, runtime: Runtime, steps: Steps
    ) -> "Reference":
        """Make a reference, with float outputs that `steps` keeps for the next budget unless they are too large."""
        if 8 * measurement.observation.metric.elements * len(samples) > FLOAT_MEMORY:
            return cls(original, samples, runtime)
        # Models that normalize to the same one still differ by rounding, so the key names the original.
        name = f"outputs of {Binding.of(original, '', {}).model}, held out"
        floats = steps.once(name, lambda: tuple(float_runs(original, measurement, samples, runtime)))
        return cls(original, samples, runtime, floats)

    def runs(self, measurement: Measurement) -> FloatRuns:
        """Return the float outputs of each batch."""
        return (
            self.floats
            if self.floats is not None
            else float_runs(self.original, measurement, self.samples, self.runtime)
        )


def verify(emission: Emission, allocation: Allocation, reference: Reference) -> Verification:
    """Run the emitted model in ONNX Runtime and compare it with the float model.

    It runs at the BASIC and the default optimization level, with one thread and with all threads of the runtime, and in
    OpenVINO if that is the target and is installed. Figures are those of the default level, whose integer kernels stand
    for the target's; those of the BASIC level if the target's kernels do not saturate.

    Raises VerificationError if the file does not load, exceeds the allocated widths, breaks a rule of its target, or
    gives outputs that are not finite or differ from run to run.
    """
    runtime, target = reference.runtime, allocation.measurement.network.target
    check_widths(emission, allocation, runtime)
    broken = violations(emission.model) if target.name == "tensorrt" else ()
    if broken:
        raise VerificationError(f"the emitted model breaks a rule of TensorRT: {broken[0]}")
    try:
        runs, optimized = onnxruntime_runs(emission.model, runtime)
        if target.name == "openvino":
            runs |= openvino_runs(emission.model, runtime.threads)
        compared = _compared(emission.model, runs, allocation.measurement, reference)
    except ModelError as error:
        fix = f"; upgrade ONNX Runtime to {'.'.join(map(str, COMPLETE))}" if runtime.version < COMPLETE else ""
        raise VerificationError(f"the emitted model does not run: {error}{fix}") from error
    if not math.isfinite(compared.measured):
        raise VerificationError("the outputs of the emitted model are not finite")
    if target.saturates:
        check_agreement(compared.signal, compared.noises, compared.gap)
    noise = float(compared.noises[_reported_level(target)].sum())
    gap = float(compared.gap.sum()) if target.saturates else 0.0
    return Verification(
        compared.measured,
        sqnr_db(float(compared.signal.sum()), noise),
        compared.measured * gap / noise if noise > 0 else gap,
        kernel_counts(optimized),
        float_layers(optimized, allocation.measurement.network),
        len(reference.samples),
    )


@dataclass(frozen=True)
class _Compared:
    """δ, and per sample the power of the signal, of the gap between the levels, and of the noise of each run."""

    measured: float
    signal: Float
    gap: Float
    noises: Mapping[str, Float]


def _reported_level(target: Target) -> str:
    """Return the optimization level whose figures are reported."""
    return DEFAULT if target.saturates else BASIC


def _compared(
    quantized: onnx.ModelProto, runs: Mapping[str, Run], measurement: Measurement, reference: Reference
) -> _Compared:
    metric, samples = measurement.observation.metric, reference.samples
    outputs = [o.name for o in reference.original.graph.output]
    reported = _reported_level(measurement.network.target)
    # Additional outputs may change how the model is fused, so they get a session of their own.
    inner = None if set(metric.outputs) <= set(outputs) else with_outputs(quantized, metric.outputs)
    session = None if inner is None else reference.runtime.session(inner, LEVELS[reported])
    powers: list[list[Float]] = []
    measured = 0.0
    batches = samples.counted_batches(measurement.observation.batching.size)
    for (count, feeds), (expected, aimed) in zip(batches, reference.runs(measurement), strict=True):
        values = {where: run(feeds, outputs) for where, run in runs.items()}
        powers.append(batch_powers(floating(expected), {where: floating(v) for where, v in values.items()}, count))
        named = dict(zip(outputs, values[reported], strict=True))
        inner_values = session.run(feeds) if session is not None else [named[n] for n in metric.outputs]
        measured += float(metric.errors(inner_values, aimed, count).sum())
    signal, gap, *errors = (np.concatenate(parts) for parts in zip(*powers, strict=True))
    return _Compared(measured / len(samples), signal, gap, dict(zip(runs, errors, strict=True)))


def check_gates(emission: Emission, verification: Verification, min_sqnr: float | None, max_bytes: int | None) -> None:
    """Raise VerificationError if the file exceeds `max_bytes` bytes or its SQNR is below `min_sqnr` dB."""
    size = model_bytes(emission.model)
    if max_bytes is not None and size > max_bytes:
        raise VerificationError(f"--max-bytes {max_bytes}: the emitted model has {size} bytes; give fewer bits")
    if min_sqnr is not None and verification.sqnr_db < min_sqnr:
        raise VerificationError(
            f"--min-sqnr {min_sqnr:g}: the emitted model has {verification.sqnr_db:.2f} dB; give more bits"
        )
