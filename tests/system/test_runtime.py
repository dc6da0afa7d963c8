"""Where models run: CUDA only if a model has actually run on it."""

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import parser

from rdoq_onnx.errors import ModelError, ProviderError, ShortageError
from rdoq_onnx.system import runtime
from rdoq_onnx.system.runtime import Runtime, Session, cuda_problem

MODEL = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3] x) => (float[N, 3] y) { y = Softmax (x) }""")
needs_cuda = pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA here: {cuda_problem()}")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Broken:
    """An installation with a CUDA provider whose libraries are missing: ONNX Runtime falls back, or raises."""

    SessionOptions = ort.SessionOptions

    def __init__(self, error=None):
        self.error = error

    def get_available_providers(self):
        return [CUDA, CPU]

    def preload_dlls(self):
        pass

    def InferenceSession(self, model, options, providers):  # noqa: N802 - ONNX Runtime's name
        if self.error and CUDA in providers:
            raise self.error
        return ort.InferenceSession(model, options, providers=[CPU])


@pytest.fixture(params=[None, RuntimeError("CUDA failure 35: old driver\nmore lines")], ids=["falls back", "raises"])
def broken(request, monkeypatch):
    monkeypatch.setattr(runtime, "ort", Broken(request.param))
    cuda_problem.cache_clear()
    yield
    cuda_problem.cache_clear()


def test_sessions_that_share_an_arena_do_not_overwrite_results():
    shared, rng = Runtime("cpu", shared_arena=True), np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((size, 3)).astype(np.float32)} for size in (9, 40_000, 9, 5)]
    found = [shared.session(MODEL).run(x)[0] for x in feeds]  # one session each, freed before the next
    for x, y in zip(feeds, found, strict=True):
        np.testing.assert_array_equal(y, Runtime("cpu").session(MODEL).run(x)[0])


def test_a_session_that_shares_an_arena_reuses_its_memory():
    resource = pytest.importorskip("resource", reason="page faults are counted on Unix")
    shared, x = Runtime("cpu", shared_arena=True), np.zeros((4_000_000, 3), np.float32)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        shared.session(MODEL).run({"x": x})
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < x.nbytes / resource.getpagesize() / 4


@pytest.mark.usefixtures("broken")
def test_cuda_that_does_not_start():
    assert Runtime("auto").providers == [CPU]
    with pytest.raises(ProviderError, match=r"--provider cuda: .*--provider cpu") as refusal:
        Runtime("cuda").providers  # noqa: B018 - the property raises
    assert "\n" not in str(refusal.value)


def test_the_cpu_when_requested():
    assert Runtime("cpu").providers == [CPU]
    assert Runtime("cpu").session(MODEL).handle.get_providers() == [CPU]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_no_more_threads_than_usable_cores():
    """With one thread per core of the machine, they would wait for each other by spinning."""
    tasks, ours = Path("/proc/self/task"), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(ours)})
        before = len([*tasks.iterdir()])
        session = Runtime("cpu").session(MODEL)
        assert len([*tasks.iterdir()]) == before
        assert session.run({"x": np.zeros((1, 3), np.float32)})[0].shape == (1, 3)
    finally:
        os.sched_setaffinity(0, ours)


@needs_cuda
def test_cuda_agrees_with_the_cpu():
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 3), np.float32)}
    values = [Runtime(where).session(MODEL).run(feeds)[0] for where in ("cuda", "cpu")]
    np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.parametrize("provider", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_values_pass_between_sessions_on_the_device(provider):
    here = Runtime(provider)
    session = here.session(MODEL)
    x = np.float32([[1, 2, 4], [0, 1, 0]])
    (once,) = session.bound({"x": x})
    (twice,) = session.bound({"x": once}, ["y"])
    assert once.shape == (2, 3)
    np.testing.assert_allclose(twice.numpy(), session.run({"x": session.run({"x": x})[0]})[0], rtol=1e-6)
    (placed,) = session.bound({"x": here.tensor(x[:, ::-1])})
    np.testing.assert_allclose(placed.numpy(), session.run({"x": x[:, ::-1]})[0], rtol=1e-6)


@pytest.mark.parametrize("feeds", [{}, {"x": np.zeros((2, 4), np.float32)}], ids=["nothing", "another shape"])
def test_bound_feeds_that_do_not_fit_are_a_one_line_error(feeds):
    with pytest.raises(ModelError, match=r"\AONNX Runtime could not run the model: .+\Z"):
        Runtime("cpu").session(MODEL).bound(feeds)


def test_values_outlive_feeds_and_handles():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3] x) => (float[N, 3] x, float[N, 3] y) { y = Relu (x) }""")
    here = Runtime("cpu")
    session = here.session(model)
    for size in (2, 100_000):
        values = []
        for k in range(9):  # freed memory is reused
            x = np.full((size, 3), k, np.float32)
            values.append([v.numpy() for v in (*session.bound({"x": x}), here.tensor(x))])
            x[:] = -1
        for k, found in enumerate(values):
            for value in found:
                np.testing.assert_array_equal(value, k)


@pytest.mark.parametrize("value", [np.array(True), np.zeros((0, 2), np.int64), np.arange(6).reshape(2, 3).T], ids=str)
def test_round_trip_to_the_device(value):
    found = Runtime("cpu").tensor(value).numpy()
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


def test_an_optimized_graph_is_device_independent():
    nodes = Runtime("auto").optimized(MODEL).graph.node
    assert [n.op_type for n in nodes] == ["Softmax"]


REASONS = {
    "arena": ("Status Message: \n/bfc_arena.cc:376 Failed to allocate memory for a buffer of size 8", ShortageError),
    "driver": ("CUDA failure 2: out of memory", ShortageError),
    "shapes": ("Invalid dimensions for input: x", ModelError),
}


@pytest.mark.parametrize(("text", "kind"), REASONS.values(), ids=REASONS)
def test_a_shortage_of_memory_has_its_own_error(text, kind):
    class Failing:
        def run(self, names, feeds):
            raise RuntimeError(text)

    with pytest.raises(ModelError) as failure:
        Session(Failing()).run({})
    assert type(failure.value) is kind
    assert "\n" not in str(failure.value)


ANSWERS = {"memory": ("echo 7", 7 << 20), "no driver": ("exit 9", 4 << 30), "no number": ("echo '[N/A]'", 4 << 30)}


@pytest.mark.parametrize(("script", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_memory_is_what_the_driver_reports(script, expected, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Runtime("cpu").memory() == expected


def test_memory_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Runtime("cpu").memory() == 4 << 30


@needs_cuda
def test_products_are_in_float32():
    """Not in TF32, which rounds 1 + 2^-12 to 1."""
    x = np.full((2, 2), 1 + 2.0**-12, np.float32)
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[2, 2] x) => (float[2, 2] y) { y = MatMul (x, x) }""")
    np.testing.assert_allclose(Runtime("cuda").session(model).run({"x": x})[0], x @ x, rtol=1e-6)
