"""Run a model for verification: at ONNX Runtime's levels and thread counts, and in OpenVINO."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import onnx
from numpy.typing import NDArray

from rdoq_onnx.system.runtime import Feeds, Level, Runtime
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, OPENVINO

Run = Callable[[Feeds, Sequence[str]], list[NDArray[Any]]]
Load = Callable[[], tuple[Run, onnx.ModelProto | None]]  # the run, and the optimized graph if that is traced
LEVELS: dict[str, Level] = {BASIC: "basic", DEFAULT: "all"}


def onnxruntime_runs(model: onnx.ModelProto, runtime: Runtime) -> dict[str, Load]:
    """Return what loads `model` at ONNX Runtime's levels, with all threads and with one, by name.

    The default level with all threads is traced.
    """

    def load(runtime: Runtime, level: Level) -> Load:
        return lambda: (runtime.session(model, level).run, None)

    def traced() -> tuple[Run, onnx.ModelProto]:
        session, optimized = runtime.traced(model, LEVELS[DEFAULT])
        return session.run, optimized

    single = replace(runtime, threads=1)
    loads: dict[str, Load] = {BASIC: load(runtime, LEVELS[BASIC]), DEFAULT: traced}
    return loads | {f"{where} with one thread": load(single, level) for where, level in LEVELS.items()}


def openvino_runs(model: onnx.ModelProto, threads: int) -> dict[str, Load]:
    """Return what loads `model` in OpenVINO, by name; nothing if OpenVINO is not installed."""
    from rdoq_onnx.system import openvino_runtime  # here: OpenVINO is slow to import

    if not openvino_runtime.installed():
        return {}

    def load() -> tuple[Run, None]:
        loaded = openvino_runtime.load(model, threads)

        def run(feeds: Feeds, names: Sequence[str]) -> list[NDArray[Any]]:
            values = loaded.run(feeds)
            return [values[name] for name in names]

        return run, None

    return {OPENVINO: load}
