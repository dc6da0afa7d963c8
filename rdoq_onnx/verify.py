"""What the emitted model really does, on samples that no measurement has seen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.budget import Allocation
from rdoq_onnx.distortion import sqnr_db
from rdoq_onnx.errors import ModelError, VerificationError
from rdoq_onnx.observation import with_outputs
from rdoq_onnx.runtime import Level, Runtime
from rdoq_onnx.samples import Samples

# Rounding ties fall differently between kernels, and deep networks carry each one on: two levels may differ by nearly
# as much as either differs from the float model. Saturation and wrong fusions instead make one of them worse.
_LEVEL_SHARE = 1.0
_LEVEL_RATIO = 1.5
_LEVELS: tuple[Level, ...] = ("basic", "all")


@dataclass(frozen=True)
class Verification:
    """What was measured on the held-out samples.

    measured: δ of the emitted model, in the unit of the predicted one. sqnr_db: signal over noise of all floating
    outputs. level_gap: δ between ONNX Runtime's BASIC and default optimization levels. kernels: node counts of the
    graph that the default level makes. samples: how many were used.
    """

    measured: float
    sqnr_db: float
    level_gap: float
    kernels: Mapping[str, int]
    samples: int


def verify_model(
    original: onnx.ModelProto,
    quantized: onnx.ModelProto,
    allocation: Allocation,
    samples: Samples,
    runtime: Runtime,
    min_sqnr: float | None = None,
) -> Verification:
    """Load `quantized` in ONNX Runtime, run it beside the float model `original` and compare.

    Raises VerificationError if the file does not load, does not hold the widths allocated, gives other numbers at
    another optimization level, or has an SQNR under `min_sqnr`.
    """
    check_widths(quantized, allocation)
    measurement = allocation.measurement
    metric, size = measurement.observation.metric, measurement.observation.batching.size
    outputs = [o.name for o in original.graph.output]
    try:
        reference = runtime.session(original, "all")
        basic, stock = (runtime.session(quantized, level) for level in _LEVELS)
        aimed = runtime.session(measurement.aimed.model, "all")
        found = runtime.session(with_outputs(quantized, metric.outputs), "all")
        signal = noise = plain = gap = measured = 0.0
        for count, feeds in samples.counted_batches(size):
            target, given = _floats(reference.run(feeds, outputs)), _floats(stock.run(feeds, outputs))
            signal += _power(target)
            noise += _power([a - b for a, b in zip(given, target, strict=True)])
            unfused = _floats(basic.run(feeds, outputs))
            plain += _power([a - b for a, b in zip(unfused, target, strict=True)])
            gap += _power([a - b for a, b in zip(given, unfused, strict=True)])
            measured += float(metric.errors(found.run(feeds), aimed.run(feeds), count).sum())
        kernels = _kernels(runtime.optimized(quantized, "all"))
    except ModelError as error:
        raise VerificationError(f"the emitted model does not run: {error}") from error
    measured /= len(samples)
    _judge_fusion(signal, noise, plain)
    level_gap = measured * gap / noise if noise > 0 else gap
    result = Verification(measured, sqnr_db(signal, noise), level_gap, kernels, len(samples))
    _judge(result, min_sqnr)
    return result


def check_widths(quantized: onnx.ModelProto, allocation: Allocation) -> None:
    """Raise VerificationError unless each channel's integers in the file fit the width that was allocated."""
    tensors = {t.name: t for t in quantized.graph.initializer}
    nodes = {n.name: n for n in quantized.graph.node}
    producer = {o: n for n in quantized.graph.node for o in n.output}
    for layer, bits in zip(allocation.measurement.network.layers, allocation.layer_bits, strict=True):
        decoder = producer[nodes[layer.name].input[layer.linear.weight_side]]
        rows = layer.linear.rows(numpy_helper.to_array(tensors[decoder.input[0]]).astype(np.int64))
        spans = rows.max(axis=1) - rows.min(axis=1)
        wide = np.flatnonzero(spans >= np.left_shift(1, bits))
        if len(wide):
            unit = int(wide[0])
            found = f"{spans[unit] + 1} levels in the file, {bits[unit]} bits allocated"
            raise VerificationError(f"layer {layer.name!r}, channel {unit}: {found}")


def _judge_fusion(signal: float, noise: float, plain: float) -> None:
    """Compare the noise at the default level with that at the BASIC level, `plain`."""
    if noise > _LEVEL_RATIO * plain + 1e-9 * signal:
        raise VerificationError(
            f"the emitted model has {sqnr_db(signal, noise):.1f} dB at ONNX Runtime's default level, "
            f"{sqnr_db(signal, plain):.1f} dB at its BASIC level"
        )


def _judge(found: Verification, min_sqnr: float | None) -> None:
    if not math.isfinite(found.measured):
        raise VerificationError("the emitted model gives outputs that are not finite")
    if found.level_gap > _LEVEL_SHARE * found.measured and found.level_gap > 1e-9:
        raise VerificationError(
            "the emitted model gives other numbers at ONNX Runtime's BASIC level than at its default level: "
            f"distortion {found.level_gap:.3g} between them, {found.measured:.3g} from the float model"
        )
    if min_sqnr is not None and found.sqnr_db < min_sqnr:
        raise VerificationError(
            f"--min-sqnr {min_sqnr:g}: the emitted model has {found.sqnr_db:.2f} dB; give more bits"
        )


def _kernels(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _floats(values: list[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """The floating-point ones of the outputs."""
    return [v.astype(np.float64) for v in values if v.dtype.kind == "f"]


def _power(values: list[NDArray[Any]]) -> float:
    return float(sum(np.square(v.astype(np.float64)).sum() for v in values))
