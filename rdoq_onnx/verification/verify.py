"""What the emitted model really does, on samples that no measurement has seen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.emission.tensorrt_rules import violations
from rdoq_onnx.errors import ModelError, VerificationError
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.model.sizes import model_bytes
from rdoq_onnx.observation.distortion import sqnr_db
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.targets import COMPLETE
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, check_agreement
from rdoq_onnx.verification.kernels import float_layers, kernel_counts
from rdoq_onnx.verification.runs import (
    LEVELS,
    FloatRuns,
    batch_powers,
    float_runs,
    floating,
    onnxruntime_runs,
    openvino_runs,
)
from rdoq_onnx.verification.widths import check_widths


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


def verify_model(
    original: onnx.ModelProto,
    emission: Emission,
    allocation: Allocation,
    samples: Samples,
    runtime: Runtime,
    min_sqnr: float | None = None,
    floats: FloatRuns | None = None,
) -> Verification:
    """Load the emitted model in ONNX Runtime, run it beside the float model `original` and compare.

    It runs at the BASIC and the default optimization level, with one thread and with all that `runtime` may use, and in
    the target's own runtime where that is installed. floats: the `float_runs`, where they are known.

    Raises VerificationError if the file does not load, does not hold the widths allocated, gives other numbers from one
    run to another, breaks a rule of its target, or has an SQNR under `min_sqnr`. Figures are those of the default
    level, whose integer kernels stand for the target's; those of the BASIC level where the target's do not saturate.
    """
    quantized, target = emission.model, allocation.measurement.network.target
    check_widths(emission, allocation, runtime)
    broken = violations(quantized) if target.name == "tensorrt" else ()
    if broken:
        raise VerificationError(f"the emitted model breaks a rule of TensorRT: {broken[0]}")
    measurement = allocation.measurement
    metric, size = measurement.observation.metric, measurement.observation.batching.size
    outputs = [o.name for o in original.graph.output]
    shown = DEFAULT if target.saturates else BASIC
    try:
        runs, optimized = onnxruntime_runs(quantized, runtime)
        if target.name == "openvino":
            runs |= openvino_runs(quantized, runtime.threads)
        # Outputs more than the model has may change how it is fused.
        inner = None if set(metric.outputs) <= set(outputs) else with_outputs(quantized, metric.outputs)
        found = None if inner is None else runtime.session(inner, LEVELS[shown])
        powers: list[list[NDArray[np.float64]]] = []
        measured = 0.0
        known = floats if floats is not None else float_runs(original, measurement, samples, runtime)
        for (count, feeds), (wanted, aimed) in zip(samples.counted_batches(size), known, strict=True):
            values = {where: run(feeds, outputs) for where, run in runs.items()}
            powers.append(batch_powers(floating(wanted), {where: floating(v) for where, v in values.items()}, count))
            named = dict(zip(outputs, values[shown], strict=True))
            ends = found.run(feeds) if found is not None else [named[n] for n in metric.outputs]
            measured += float(metric.errors(ends, aimed, count).sum())
    except ModelError as error:
        mend = f"; {'.'.join(map(str, COMPLETE))} runs all that is emitted" if runtime.version < COMPLETE else ""
        raise VerificationError(f"the emitted model does not run: {error}{mend}") from error
    measured /= len(samples)
    signal, gap, *errors = (np.concatenate(parts) for parts in zip(*powers, strict=True))
    noises = dict(zip(runs, errors, strict=True))
    if target.saturates:
        check_agreement(signal, noises, gap)
    noise = float(noises[shown].sum())
    apart = float(gap.sum()) if target.saturates else 0.0
    result = Verification(
        measured,
        sqnr_db(float(signal.sum()), noise),
        measured * apart / noise if noise > 0 else apart,
        kernel_counts(optimized),
        float_layers(optimized, allocation.measurement.network),
        len(samples),
    )
    _judge(result, min_sqnr)
    return result


def check_size(model: onnx.ModelProto, max_bytes: int | None) -> None:
    """Raise VerificationError if the file is larger than `max_bytes`."""
    size = model_bytes(model)
    if max_bytes is not None and size > max_bytes:
        raise VerificationError(f"--max-bytes {max_bytes}: the emitted model has {size} bytes; give fewer bits")


def _judge(found: Verification, min_sqnr: float | None) -> None:
    if not math.isfinite(found.measured):
        raise VerificationError("the emitted model gives outputs that are not finite")
    if min_sqnr is not None and found.sqnr_db < min_sqnr:
        raise VerificationError(
            f"--min-sqnr {min_sqnr:g}: the emitted model has {found.sqnr_db:.2f} dB; give more bits"
        )


