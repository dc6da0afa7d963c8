"""Run a model for verification: at ONNX Runtime's levels and thread counts, and in OpenVINO."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import onnx
from numpy.typing import NDArray

from rdoq_onnx.system.runtime import Feeds, Level, Runtime
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, OPENVINO

Run = Callable[[Feeds, Sequence[str]], list[NDArray[Any]]]
LEVELS: dict[str, Level] = {BASIC: "basic", DEFAULT: "all"}


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
