"""What the emitted model really does, on samples that no measurement has seen."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.budget import Allocation
from rdoq_onnx.distortion import sqnr_db
from rdoq_onnx.emission import Emission
from rdoq_onnx.errors import ModelError, VerificationError
from rdoq_onnx.graph import upstream
from rdoq_onnx.kernels import float_layers, kernel_counts
from rdoq_onnx.measurement import Measurement
from rdoq_onnx.observation import with_outputs
from rdoq_onnx.passes import model_bytes
from rdoq_onnx.runtime import Feeds, Level, Runtime
from rdoq_onnx.samples import Samples
from rdoq_onnx.targets import COMPLETE
from rdoq_onnx.tensorrt_rules import violations

Run = Callable[[Feeds, Sequence[str]], list[NDArray[Any]]]
Arrays = tuple[NDArray[Any], ...]
FloatRuns = Iterable[tuple[Arrays, Arrays]]  # of each batch

# Rounding ties fall differently between kernels, and deep networks carry each one on: two levels may differ by nearly
# as much as either differs from the float model. Saturation and wrong fusions instead make one of them worse.
_LEVEL_SHARE = 1.0
_LEVEL_RATIO = 1.5
_RUNTIME_RATIO = 3.0  # another runtime rounds ties of its own
_OPENVINO = "OpenVINO"
_INAUDIBLE = 1e-5  # share of the signal, 50 dB: noise under that is no fault
_LEVELS: tuple[Level, ...] = ("basic", "all")


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
    try:
        basic, stock = (runtime.session(quantized, level) for level in _LEVELS)
        others: dict[str, Run] = {
            f"ONNX Runtime's {level} level with one thread": replace(runtime, threads=1).session(quantized, level).run
            for level in _LEVELS
        }
        if target.name == "openvino":
            others |= _in_openvino(quantized, runtime.threads)
        level: Level = "all" if target.saturates else "basic"
        # Outputs more than the model has may change how it is fused.
        inner = None if set(metric.outputs) <= set(outputs) else with_outputs(quantized, metric.outputs)
        found = None if inner is None else runtime.session(inner, level)
        sums, signal, gap, measured = np.zeros(2 + len(others)), 0.0, 0.0, 0.0
        known = floats if floats is not None else float_runs(original, measurement, samples, runtime)
        for (count, feeds), (wanted, aimed) in zip(samples.counted_batches(size), known, strict=True):
            values = {"all": stock.run(feeds, outputs), "basic": basic.run(feeds, outputs)}
            target_values, given, unfused = _floats(wanted), _floats(values["all"]), _floats(values["basic"])
            runs = [given, unfused, *(_floats(run(feeds, outputs)) for run in others.values())]
            signal += _power(target_values)
            sums += [_power([a - b for a, b in zip(values, target_values, strict=True)]) for values in runs]
            gap += _power([a - b for a, b in zip(given, unfused, strict=True)])
            named = dict(zip(outputs, values[level], strict=True))
            ends = found.run(feeds) if found is not None else [named[n] for n in metric.outputs]
            measured += float(metric.errors(ends, aimed, count).sum())
        optimized = runtime.optimized(quantized, "all")
    except ModelError as error:
        mend = f"; {'.'.join(map(str, COMPLETE))} runs all that is emitted" if runtime.version < COMPLETE else ""
        raise VerificationError(f"the emitted model does not run: {error}{mend}") from error
    measured /= len(samples)
    noise, plain = float(sums[0]), float(sums[1])
    where = ("ONNX Runtime's default level", *others)
    if target.saturates:
        _judge_fusion(signal, dict(zip(where, [noise, *sums[2:].tolist()], strict=True)), plain)
    else:
        noise, gap = plain, 0.0
    result = Verification(
        measured,
        sqnr_db(signal, noise),
        measured * gap / noise if noise > 0 else gap,
        kernel_counts(optimized),
        float_layers(optimized, allocation.measurement.network),
        len(samples),
    )
    _judge(result, min_sqnr)
    return result


def float_runs(
    original: onnx.ModelProto, measurement: Measurement, samples: Samples, runtime: Runtime
) -> Iterator[tuple[Arrays, Arrays]]:
    """For each batch of `samples` the floating outputs of `original`, and what distortion is measured against."""
    reference, aimed = (runtime.session(model, "all") for model in (original, measurement.aimed.model))
    outputs, metric = [o.name for o in original.graph.output], measurement.observation.metric
    for feeds in samples.batches(measurement.observation.batching.size):
        wanted = tuple(v for v in reference.run(feeds, outputs) if v.dtype.kind == "f")
        yield wanted, tuple(aimed.run(feeds, metric.outputs))


def check_size(model: onnx.ModelProto, max_bytes: int | None) -> None:
    """Raise VerificationError if the file is larger than `max_bytes`."""
    size = model_bytes(model)
    if max_bytes is not None and size > max_bytes:
        raise VerificationError(f"--max-bytes {max_bytes}: the emitted model has {size} bytes; give fewer bits")


def check_widths(emission: Emission, allocation: Allocation, runtime: Runtime) -> None:
    """Raise VerificationError unless each channel's integers in the file fit the width that was allocated."""
    if not allocation.layer_bits:
        return
    nodes = {n.name: n for n in emission.model.graph.node}
    producer = {o: n for n in emission.model.graph.node for o in n.output}
    layers = allocation.measurement.network.layers
    sources = {}
    for layer in layers:
        decoder = producer[nodes[layer.name].input[layer.linear.weight_side]]
        # DequantizeLinear reads the integers; a Mul reads them behind a Cast.
        sources[layer.name] = (producer[decoder.input[0]] if decoder.op_type == "Mul" else decoder).input[0]
    values = dict(zip(sources, constants(emission.model, list(sources.values()), runtime), strict=True))
    for layer, bits in zip(layers, allocation.layer_bits, strict=True):
        kept = np.delete(np.arange(len(bits)), list(emission.removed.get(layer.name, ())))
        rows = np.moveaxis(values[layer.name].astype(np.int64), layer.linear.axis, 0).reshape(len(kept), -1)
        spans = rows.max(axis=1) - rows.min(axis=1)
        wide = np.flatnonzero(spans >= np.left_shift(1, bits[kept]))
        if len(wide):
            unit = int(wide[0])
            found = f"{spans[unit] + 1} levels in the file, {bits[kept[unit]]} bits allocated"
            raise VerificationError(f"layer {layer.name!r}, channel {kept[unit]}: {found}")


def constants(model: onnx.ModelProto, names: Sequence[str], runtime: Runtime) -> list[NDArray[Any]]:
    """The values of tensors of `model` that depend on no input, as ONNX Runtime decodes them."""
    needed = upstream(names, {o: n for n in model.graph.node for o in n.output})
    reads = {*names, *(i for n in needed for i in n.input)}
    stored = [t for t in model.graph.initializer if t.name in reads]
    outputs = [onnx.ValueInfoProto(name=n) for n in names]
    graph = helper.make_graph(needed, "constants", [], outputs, stored)
    part = helper.make_model(graph, ir_version=model.ir_version, opset_imports=model.opset_import)
    return runtime.session(part, "none").run({}, names)


def _judge_fusion(signal: float, noises: Mapping[str, float], plain: float) -> None:
    """Compare the noise of runs, by where they ran, with that at the BASIC level of ONNX Runtime, `plain`."""
    for where, noise in noises.items():
        ratio = _RUNTIME_RATIO if where == _OPENVINO else _LEVEL_RATIO
        if noise > ratio * plain + _INAUDIBLE * signal:
            raise VerificationError(
                f"the emitted model has {sqnr_db(signal, noise):.1f} dB at {where}, "
                f"{sqnr_db(signal, plain):.1f} dB at ONNX Runtime's BASIC level"
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


def _in_openvino(model: onnx.ModelProto, threads: int) -> dict[str, Run]:
    """How `model` runs in OpenVINO, by that name; nothing where it is not installed."""
    from rdoq_onnx import openvino_runtime  # here: OpenVINO is slow to import

    if not openvino_runtime.installed():
        return {}
    loaded = openvino_runtime.load(model, threads)

    def run(feeds: Feeds, names: Sequence[str]) -> list[NDArray[Any]]:
        values = loaded.run(feeds)
        return [values[name] for name in names]

    return {_OPENVINO: run}


def _floats(values: Sequence[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """The floating-point ones of the outputs."""
    return [v.astype(np.float64) for v in values if v.dtype.kind == "f"]


def _power(values: list[NDArray[Any]]) -> float:
    return float(sum(np.square(v.astype(np.float64)).sum() for v in values))
