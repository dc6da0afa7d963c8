"""Run a model for verification: at ONNX Runtime's levels and thread counts, in OpenVINO, and in float."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.system.runtime import Feeds, Level, Runtime
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, OPENVINO

Run = Callable[[Feeds, Sequence[str]], list[NDArray[Any]]]
Arrays = tuple[NDArray[Any], ...]
FloatRuns = Iterable[tuple[Arrays, Arrays]]  # per batch
LEVELS: dict[str, Level] = {BASIC: "basic", DEFAULT: "all"}


def float_runs(
    original: onnx.ModelProto, measurement: Measurement, samples: Samples, runtime: Runtime
) -> Iterator[tuple[Arrays, Arrays]]:
    """Yield for each batch of `samples` the float outputs of `original` and the reference outputs of distortion."""
    reference, aimed = (runtime.session(model, "all") for model in (original, measurement.aimed.model))
    outputs, metric = [o.name for o in original.graph.output], measurement.observation.metric
    for feeds in samples.batches(measurement.observation.batching.size):
        expected = tuple(v for v in reference.run(feeds, outputs) if v.dtype.kind == "f")
        yield expected, tuple(aimed.run(feeds, metric.outputs))


def onnxruntime_runs(model: onnx.ModelProto, runtime: Runtime) -> tuple[dict[str, Run], onnx.ModelProto]:
    """Load `model` at ONNX Runtime's levels, with all threads and with one; runs by name.

    Also returns the optimized graph of the default level.
    """
    basic = runtime.session(model, LEVELS[BASIC])
    default, optimized = runtime.traced(model, LEVELS[DEFAULT])
    single, sessions = replace(runtime, threads=1), {BASIC: basic, DEFAULT: default}
    sessions |= {f"{where} with one thread": single.session(model, level) for where, level in LEVELS.items()}
    return {where: session.run for where, session in sessions.items()}, optimized


def openvino_runs(model: onnx.ModelProto, threads: int) -> dict[str, Run]:
    """Load `model` in OpenVINO; its run by name, nothing if OpenVINO is not installed."""
    from rdoq_onnx.system import openvino_runtime  # here: OpenVINO is slow to import

    if not openvino_runtime.installed():
        return {}
    loaded = openvino_runtime.load(model, threads)

    def run(feeds: Feeds, names: Sequence[str]) -> list[NDArray[Any]]:
        values = loaded.run(feeds)
        return [values[name] for name in names]

    return {OPENVINO: run}


def floating(values: Sequence[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """Return the float outputs, as float64."""
    return [v.astype(np.float64) for v in values if v.dtype.kind == "f"]


def batch_powers(
    expected: list[NDArray[np.float64]], runs: Mapping[str, list[NDArray[np.float64]]], count: int
) -> list[NDArray[np.float64]]:
    """Return for each of `count` samples the power of the signal, of the level gap, and of the errors of each run."""

    def power(differences: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        return sum((np.square(d).reshape(count, -1).sum(axis=1) for d in differences), np.zeros(count))

    def difference(one: list[NDArray[np.float64]], other: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return power(a - b for a, b in zip(one, other, strict=True))

    errors = (difference(values, expected) for values in runs.values())
    return [power(expected), difference(runs[DEFAULT], runs[BASIC]), *errors]
