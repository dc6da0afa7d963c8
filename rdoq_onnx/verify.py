"""What the emitted model really does, on samples that no measurement has seen."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.agreement import BASIC, DEFAULT, OPENVINO, check_agreement
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

_LEVELS: dict[str, Level] = {BASIC: "basic", DEFAULT: "all"}


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
        runs, optimized = _runs(quantized, runtime)
        if target.name == "openvino":
            runs |= _in_openvino(quantized, runtime.threads)
        # Outputs more than the model has may change how it is fused.
        inner = None if set(metric.outputs) <= set(outputs) else with_outputs(quantized, metric.outputs)
        found = None if inner is None else runtime.session(inner, _LEVELS[shown])
        powers: list[list[NDArray[np.float64]]] = []
        measured = 0.0
        known = floats if floats is not None else float_runs(original, measurement, samples, runtime)
        for (count, feeds), (wanted, aimed) in zip(samples.counted_batches(size), known, strict=True):
            values = {where: run(feeds, outputs) for where, run in runs.items()}
            powers.append(_powers(_floats(wanted), {where: _floats(v) for where, v in values.items()}, count))
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


def _judge(found: Verification, min_sqnr: float | None) -> None:
    if not math.isfinite(found.measured):
        raise VerificationError("the emitted model gives outputs that are not finite")
    if min_sqnr is not None and found.sqnr_db < min_sqnr:
        raise VerificationError(
            f"--min-sqnr {min_sqnr:g}: the emitted model has {found.sqnr_db:.2f} dB; give more bits"
        )


def _runs(model: onnx.ModelProto, runtime: Runtime) -> tuple[dict[str, Run], onnx.ModelProto]:
    """How `model` runs at the levels of ONNX Runtime, with all threads and with one, by what these are called.

    Also returns the graph that the default level makes of it.
    """
    basic = runtime.session(model, _LEVELS[BASIC])
    default, optimized = runtime.traced(model, _LEVELS[DEFAULT])
    single, sessions = replace(runtime, threads=1), {BASIC: basic, DEFAULT: default}
    sessions |= {f"{where} with one thread": single.session(model, level) for where, level in _LEVELS.items()}
    return {where: session.run for where, session in sessions.items()}, optimized


def _in_openvino(model: onnx.ModelProto, threads: int) -> dict[str, Run]:
    """How `model` runs in OpenVINO, by that name; nothing where it is not installed."""
    from rdoq_onnx import openvino_runtime  # here: OpenVINO is slow to import

    if not openvino_runtime.installed():
        return {}
    loaded = openvino_runtime.load(model, threads)

    def run(feeds: Feeds, names: Sequence[str]) -> list[NDArray[Any]]:
        values = loaded.run(feeds)
        return [values[name] for name in names]

    return {OPENVINO: run}


def _floats(values: Sequence[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """The floating-point ones of the outputs."""
    return [v.astype(np.float64) for v in values if v.dtype.kind == "f"]


def _powers(
    wanted: list[NDArray[np.float64]], runs: Mapping[str, list[NDArray[np.float64]]], count: int
) -> list[NDArray[np.float64]]:
    """Of each of `count` samples: power of the signal, of the gap between the levels, and of the errors of `runs`."""

    def power(differences: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        return sum((np.square(d).reshape(count, -1).sum(axis=1) for d in differences), np.zeros(count))

    def apart(one: list[NDArray[np.float64]], other: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return power(a - b for a, b in zip(one, other, strict=True))

    return [power(wanted), apart(runs[DEFAULT], runs[BASIC]), *(apart(values, wanted) for values in runs.values())]
