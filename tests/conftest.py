"""Fixtures for all tests: the zoo of real models, and ONNX Runtime as the judge of what a model computes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from rdoq_onnx.profiling import measured
from rdoq_onnx.profiling.micro_models import Slopes

# How long an example takes depends on what else the machine does; benchmarks judge speed.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

ROOT = Path(__file__).parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
Feeds = Mapping[str, NDArray[Any]]
OrtRun = Callable[..., list[NDArray[Any]]]

LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Folder of real models with samples; tests that need it are skipped where it is not."""
    if not ZOO.is_dir():
        pytest.skip(f"no zoo of real models at {ZOO}")
    return ZOO


@pytest.fixture(scope="session")
def ort_run() -> OrtRun:
    """`ort_run(model, feeds, level="basic")`: all outputs, on the CPU, at a pinned optimization level."""

    def run(model: onnx.ModelProto, feeds: Feeds, level: str = "basic") -> list[NDArray[Any]]:
        options = ort.SessionOptions()
        options.graph_optimization_level = LEVELS[level]
        options.log_severity_level = 3
        options.intra_op_num_threads = 2
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(feeds)))

    return run


def deviation(got: list[NDArray[Any]], expected: list[NDArray[Any]]) -> float:
    """Largest ‖got - expected‖ / ‖expected‖ over the outputs."""
    assert [g.shape for g in got] == [e.shape for e in expected]
    pairs = [(g.astype(np.float64), e.astype(np.float64)) for g, e in zip(got, expected, strict=True)]
    return max(float(np.linalg.norm(g - e) / max(np.linalg.norm(e), 1e-30)) for g, e in pairs)


def real_models() -> list[Any]:
    """One parameter for each model at hand: the zoo's and the project's own. Empty where there is none."""
    paths = sorted((*ZOO.rglob("*.onnx"), *(ROOT / "models").glob("*.onnx")))
    return [pytest.param(path, id="/".join(path.parts[-2:])) for path in paths]


def random_feeds(model: onnx.ModelProto, seed: int = 0, free: int = 2) -> dict[str, NDArray[Any]]:
    """Normal floats and small integers of the shapes that the model declares; unknown sizes are `free`."""
    rng = np.random.default_rng(seed)
    weights = {t.name for t in model.graph.initializer}
    feeds: dict[str, NDArray[Any]] = {}
    for info in model.graph.input:
        if info.name in weights:
            continue
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.dim_value > 0 else free for d in tensor.shape.dim]
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.issubdtype(kind, np.integer):
            feeds[info.name] = rng.integers(0, 100, shape).astype(kind)
        else:
            feeds[info.name] = rng.standard_normal(shape).astype(kind)
    return feeds


def load_plays(kind: str) -> NDArray[np.int64]:
    """The texts for calibration ("calib") or test of the bundled decoder, [96, 64]."""
    with np.load(ROOT / "models" / f"plays_{kind}.npz") as data:
        return np.asarray(data["input_ids"])


def plays_feeds(model: onnx.ModelProto, tokens: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Feeds of either form of the bundled decoder; caches are empty."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    named = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions}
    empty = np.zeros((len(tokens), 2, 0, 16), np.float32)
    return {i.name: np.ascontiguousarray(named.get(i.name, empty)) for i in model.graph.input}


def feeds_for(path: Path, model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Two samples for a model of `real_models`: from calib.npz where it fits, else random ones."""
    if path.parent.name == "silero_vad":
        rng = np.random.default_rng(0)
        return {
            "input": rng.standard_normal((1, 576)).astype(np.float32),
            "state": rng.standard_normal((2, 1, 128)).astype(np.float32),
            "sr": np.array(16000, np.int64),
        }
    if path.stem.startswith("plays_decoder"):
        return plays_feeds(model, load_plays("calib")[:2])
    calib = path.parent / "calib.npz"
    if calib.exists():
        with np.load(calib) as data:
            feeds = {k: data[k][:2] for k in data.files if k in {i.name for i in model.graph.input}}
        given = {t.name for t in model.graph.initializer}
        if feeds and set(feeds) == {i.name for i in model.graph.input} - given:
            return feeds
    return random_feeds(model)


@pytest.fixture
def steady_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all nodes take a millisecond, a run 4 in float, 2 on integers, 10 % less without a quarter of the channels.

    By its own, a layer takes half as long without channels.
    """
    profile = measured.Runtime.profiled

    def profiled(self: Any, model: Any, feeds: Any, runs: int) -> Any:
        seconds, optimized = profile(self, model, feeds, 1)
        return {name: [1e-3] for name in seconds}, optimized

    whole = iter([4e-3, 2e-3])
    monkeypatch.setattr(measured.Runtime, "profiled", profiled)
    monkeypatch.setattr(measured, "run_seconds", lambda *arguments: next(whole))
    monkeypatch.setattr(measured, "_saved_share", lambda *arguments: 0.1)
    monkeypatch.setattr(measured, "channel_slopes", lambda *arguments: Slopes(0.5, 0.5))
