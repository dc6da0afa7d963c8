"""What the emitted model really does, on samples that no measurement has seen."""

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
    """What was measured on the held-out samples.

    measured: δ of the emitted model, in the unit of the predicted one. sqnr_db: signal over noise of all floating
    outputs. level_gap: δ between ONNX Runtime's BASIC and default optimization levels. kernels: node counts of the
    graph that the default level makes. float_layers: nodes of quantized layers that the default level runs in float,
    with the reason. samples: how many were used.
    """

    measured: float
    sqnr_db: float
    level_gap: float
    kernels: Mapping[str, int]
    float_layers: Mapping[str, str]
    samples: int


@dataclass(frozen=True)
class Reference:
    """What an emitted model is compared with: the float model `original` on `samples`, in `runtime`.

    floats: the `float_runs`, which no budget changes; None where they take too much memory to be kept.
    """

    original: onnx.ModelProto
    samples: Samples
    runtime: Runtime
    floats: FloatRuns | None = None

    @classmethod
    def of(
        cls, original: onnx.ModelProto, measurement: Measurement, samples: Samples, runtime: Runtime, steps: Steps
    ) -> "Reference":
        """With the float outputs, which `steps` keeps for the next budget, unless they are too large."""
        if 8 * measurement.observation.metric.elements * len(samples) > FLOAT_MEMORY:
            return cls(original, samples, runtime)
        # Two models that are the same once they are normalized give outputs that differ by rounding.
        name = f"outputs of {Binding.of(original, '', {}).model}, held out"
        floats = steps.once(name, lambda: tuple(float_runs(original, measurement, samples, runtime)))
        return cls(original, samples, runtime, floats)

    def runs(self, measurement: Measurement) -> FloatRuns:
        """The float outputs of each batch."""
        return self.floats if self.floats is not None else float_runs(
            self.original, measurement, self.samples, self.runtime
        )  # fmt: skip


def verify(emission: Emission, allocation: Allocation, reference: Reference) -> Verification:
    """Load the emitted model in ONNX Runtime, run it beside the float model and compare.

    It runs at the BASIC and the default optimization level, with one thread and with all that the runtime may use, and
    in the target's own runtime where that is installed. Figures are those of the default level, whose integer kernels
    stand for the target's; those of the BASIC level where the target's do not saturate.

    Raises VerificationError if the file does not load, does not hold the widths allocated, gives other numbers from one
    run to another, none that is finite, or breaks a rule of its target.
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
        fix = f"; {'.'.join(map(str, COMPLETE))} runs all that is emitted" if runtime.version < COMPLETE else ""
        raise VerificationError(f"the emitted model does not run: {error}{fix}") from error
    if not math.isfinite(compared.measured):
        raise VerificationError("the emitted model gives outputs that are not finite")
    if target.saturates:
        check_agreement(compared.signal, compared.noises, compared.gap)
    noise = float(compared.noises[_shown(target)].sum())
    apart = float(compared.gap.sum()) if target.saturates else 0.0
    return Verification(
        compared.measured,
        sqnr_db(float(compared.signal.sum()), noise),
        compared.measured * apart / noise if noise > 0 else apart,
        kernel_counts(optimized),
        float_layers(optimized, allocation.measurement.network),
        len(reference.samples),
    )


@dataclass(frozen=True)
class _Compared:
    """measured: δ. Of each sample: power of the signal, of the gap between the levels, of the noise of each run."""

    measured: float
    signal: Float
    gap: Float
    noises: Mapping[str, Float]


def _shown(target: Target) -> str:
    """The level whose figures are reported."""
    return DEFAULT if target.saturates else BASIC


def _compared(
    quantized: onnx.ModelProto, runs: Mapping[str, Run], measurement: Measurement, reference: Reference
) -> _Compared:
    metric, samples = measurement.observation.metric, reference.samples
    outputs, shown = [o.name for o in reference.original.graph.output], _shown(measurement.network.target)
    # Outputs more than the model has may change how it is fused.
    inner = None if set(metric.outputs) <= set(outputs) else with_outputs(quantized, metric.outputs)
    session = None if inner is None else reference.runtime.session(inner, LEVELS[shown])
    powers: list[list[Float]] = []
    measured = 0.0
    batches = samples.counted_batches(measurement.observation.batching.size)
    for (count, feeds), (wanted, aimed) in zip(batches, reference.runs(measurement), strict=True):
        values = {where: run(feeds, outputs) for where, run in runs.items()}
        powers.append(batch_powers(floating(wanted), {where: floating(v) for where, v in values.items()}, count))
        named = dict(zip(outputs, values[shown], strict=True))
        ends = session.run(feeds) if session is not None else [named[n] for n in metric.outputs]
        measured += float(metric.errors(ends, aimed, count).sum())
    signal, gap, *errors = (np.concatenate(parts) for parts in zip(*powers, strict=True))
    return _Compared(measured / len(samples), signal, gap, dict(zip(runs, errors, strict=True)))


def check_gates(emission: Emission, found: Verification, min_sqnr: float | None, max_bytes: int | None) -> None:
    """Raise VerificationError if the file is larger than `max_bytes` or has an SQNR under `min_sqnr` dB."""
    size = model_bytes(emission.model)
    if max_bytes is not None and size > max_bytes:
        raise VerificationError(f"--max-bytes {max_bytes}: the emitted model has {size} bytes; give fewer bits")
    if min_sqnr is not None and found.sqnr_db < min_sqnr:
        raise VerificationError(
            f"--min-sqnr {min_sqnr:g}: the emitted model has {found.sqnr_db:.2f} dB; give more bits"
        )
