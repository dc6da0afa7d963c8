"""The public API: eleven names, whatever calibration may be, and the steps one by one."""

import dataclasses
import doctest
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx import api
from tests.conftest import ROOT, OrtRun

CNN, VIT = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_vit.onnx"
CALIBRATION = ROOT / "models" / "digits_calib.npz"
COUNT = 8


def test_public_names() -> None:
    assert rdoq_onnx.__all__ == [
        "Allocation",
        "Measurement",
        "RdoqError",
        "Report",
        "Result",
        "__version__",
        "allocate",
        "compare",
        "emit",
        "measure",
        "quantize",
    ]
    for name in rdoq_onnx.__all__:
        value = getattr(rdoq_onnx, name)
        assert isinstance(value, str) or value.__doc__, f"{name} has no docstring"


@pytest.fixture(scope="module")
def x() -> NDArray[np.float32]:
    """Digits as the models take them, [COUNT, 1, 28, 28]."""
    with np.load(CALIBRATION) as data:
        scaled = (data["x"][:COUNT] / np.float32(255) - data["mean"]) / data["std"]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(CNN)


@pytest.fixture(scope="module")
def measurement(model: onnx.ModelProto, x: NDArray[np.float32]) -> rdoq_onnx.Measurement:
    return rdoq_onnx.measure(model, {"input": x}, threads=1)


class Reader:
    """ONNX Runtime's CalibrationDataReader, three samples a feed at most."""

    def __init__(self, x: NDArray[np.float32]) -> None:
        self.feeds: Iterator[dict[str, Any]] = iter([{"input": x[i : i + 3]} for i in range(0, len(x), 3)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def as_path(x: NDArray[np.float32], folder: Path) -> Path:
    np.savez(folder / "samples.npz", input=x)
    return folder / "samples.npz"


SOURCES: dict[str, Callable[[NDArray[np.float32], Path], Any]] = {
    "path": as_path,
    "string": lambda x, folder: str(as_path(x, folder)),
    "arrays": lambda x, folder: {"input": x},
    "list of feeds": lambda x, folder: [{"input": row[None]} for row in x],
    "generator of feeds": lambda x, folder: ({"input": row[None]} for row in x),
    "data reader": lambda x, folder: Reader(x),
}


@pytest.fixture(scope="module")
def expected_result(model: onnx.ModelProto, x: NDArray[np.float32]) -> rdoq_onnx.Result:
    return rdoq_onnx.quantize(model, {"input": x}, bits=4, threads=1)


@pytest.fixture(scope="module")
def expected(expected_result: rdoq_onnx.Result) -> bytes:
    return expected_result.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("source", SOURCES)
def test_quantize_gives_the_same_from_every_kind_of_calibration(
    model: onnx.ModelProto, x: NDArray[np.float32], expected: bytes, tmp_path: Path, source: str
) -> None:
    result = rdoq_onnx.quantize(model, SOURCES[source](x, tmp_path), bits=4, threads=1)
    assert result.model.SerializeToString(deterministic=True) == expected
    assert result.report.samples == COUNT


def test_quantize_takes_a_path_as_well_as_a_model_which_it_leaves_alone(
    model: onnx.ModelProto, x: NDArray[np.float32], expected: bytes
) -> None:
    before = model.SerializeToString(deterministic=True)
    for path in (CNN, str(CNN)):
        result = rdoq_onnx.quantize(path, {"input": x}, bits=4, threads=1)
        assert result.model.SerializeToString(deterministic=True) == expected
        assert result.report.input == str(CNN)
    rdoq_onnx.emit(model, rdoq_onnx.allocate(rdoq_onnx.measure(model, {"input": x}, threads=1), bits=3))
    assert model.SerializeToString(deterministic=True) == before


def test_result_saves_what_it_holds_whole_or_not_at_all(
    model: onnx.ModelProto, x: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rdoq_onnx.quantize(model, {"input": x}, bits=4, threads=1)
    path = tmp_path / "out.onnx"
    result.save(path)
    assert onnx.load(path) == result.model
    assert path.stat().st_size == result.report.output_bytes
    path.write_bytes(b"before")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(rdoq_onnx.RdoqError, match="No space left"):
        result.save(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_one_measurement_serves_many_budgets(
    model: onnx.ModelProto, x: NDArray[np.float32], measurement: rdoq_onnx.Measurement, ort_run: OrtRun
) -> None:
    target = ort_run(model, {"input": x})[0]
    predicted, real = [], []
    for bits in (6, 4, 2.5):
        allocation = rdoq_onnx.allocate(measurement, bits=bits)
        assert allocation.weight_average <= bits
        assert allocation.activation_average is not None
        assert allocation.activation_average <= bits
        emitted = rdoq_onnx.emit(model, allocation)
        onnx.checker.check_model(emitted)
        predicted.append(allocation.predicted)
        real.append(float(np.square(ort_run(emitted, {"input": x}, "all")[0] - target).mean()))
    assert predicted == sorted(predicted)
    assert real == sorted(real)


def test_allocate_has_a_budget_for_each_side_one_for_both_and_pins(measurement: rdoq_onnx.Measurement) -> None:
    apart = rdoq_onnx.allocate(measurement, weight_bits=3, activation_bits=6)
    assert apart.weight_average <= 3 < (apart.activation_average or 0) <= 6
    joint = rdoq_onnx.allocate(measurement, bits=4, joint=True)
    assert joint.predicted <= rdoq_onnx.allocate(measurement, bits=4).predicted
    pinned = rdoq_onnx.allocate(measurement, bits=4, pins=(("/0/Conv", 2),))
    assert set(pinned.layer_bits[0].tolist()) == {2}


def test_weights_only_leaves_activations_alone(model: onnx.ModelProto, x: NDArray[np.float32]) -> None:
    measurement = rdoq_onnx.measure(model, {"input": x}, weights_only=True, threads=1)
    allocation = rdoq_onnx.allocate(measurement, bits=8)
    assert allocation.activation_average is None
    assert max(bits.max() for bits in allocation.layer_bits) == 8
    emitted = rdoq_onnx.emit(model, allocation)
    assert "QuantizeLinear" not in {n.op_type for n in emitted.graph.node}


def test_examples_of_the_docstrings_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = doctest.testmod(api)
    assert done.attempted > 5
    assert done.failed == 0


def test_a_notebook_shows_the_table(expected_result: rdoq_onnx.Result) -> None:
    table = expected_result._repr_html_()
    assert table.startswith("<table>")
    assert f"{expected_result.report.sqnr_db:.2f} dB" in table
    named = dataclasses.replace(expected_result.report, input="<b>")
    assert "&lt;b&gt;" in named.to_html()


def test_emit_refuses_another_model(model: onnx.ModelProto, measurement: rdoq_onnx.Measurement) -> None:
    allocation = rdoq_onnx.allocate(measurement, bits=4)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weight = changed.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 2, weight.name))
    for other in (changed, VIT):
        with pytest.raises(rdoq_onnx.RdoqError, match="not the model that the allocation was measured on"):
            rdoq_onnx.emit(other, allocation)


def test_errors_are_of_one_family_and_misspelt_options_are_refused(
    model: onnx.ModelProto, x: NDArray[np.float32], measurement: rdoq_onnx.Measurement
) -> None:
    for bits in (float("nan"), 9, -1):
        with pytest.raises(rdoq_onnx.RdoqError, match="out of range"):
            rdoq_onnx.quantize(model, {"input": x}, bits=bits)
    with pytest.raises(rdoq_onnx.RdoqError, match="none_such"):
        rdoq_onnx.quantize("none_such.onnx", {"input": x})
    with pytest.raises(rdoq_onnx.RdoqError, match="matches no layer"):
        rdoq_onnx.allocate(measurement, bits=4, pins=(("none_such", 4),))
    with pytest.raises(rdoq_onnx.RdoqError, match="sede is not an option; the nearest is seed"):
        rdoq_onnx.quantize(model, {"input": x}, sede=1)


TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bits": ({"bits": "4"}, {"bits": 4.0}),
    "no activations": ({"bits": 3, "activation_bits": "none"}, {"bits": 3, "weights_only": True}),
    "size": ({"size": "2kB"}, {"size": 2000}),
    "pins as a dict": ({"pins": {"/0/Conv": "2"}}, {"pins": (("/0/Conv", 2),)}),
    "pins as text": ({"pins": ["/0/Conv=2"]}, {"pins": (("/0/Conv", 2),)}),
    "one pin": ({"pins": ("/0/Conv", 2)}, {"pins": (("/0/Conv", 2),)}),
    "one pattern": ({"exclude": "/0/Conv"}, {"exclude": ("/0/Conv",)}),
    "widths": ({"widths": "2,4-6"}, {"widths": (2, 4, 5, 6)}),
    "numpy": ({"seed": np.int64(3), "widths": np.array([2, 4])}, {"seed": 3, "widths": (2, 4)}),
}


@pytest.mark.parametrize("case", TEXT)
def test_text_of_the_command_line_is_understood(model: onnx.ModelProto, x: NDArray[np.float32], case: str) -> None:
    text, plain = (rdoq_onnx.quantize(model, {"input": x}, effort="fast", threads=1, **o) for o in TEXT[case])
    assert text.model.SerializeToString(deterministic=True) == plain.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": "four"}, "--bits 'four' is not a number"),
        ({"bits": None}, "--bits None is not a number"),
        ({"bits": "2,3"}, "--bits '2,3' is not a number"),
        ({"weights_only": 1}, "weights_only 1: give True or False"),
        ({"joint": "yes"}, "--joint 'yes': give True or False"),
        ({"pins": [("/0/Conv",)]}, "is not a pattern with its bits"),
        ({"pins": {"/0/Conv": 2.5}}, "--pin /0/Conv 2.5 is not a whole number"),
        ({"exclude": 3}, "--exclude 3 is not a name"),
        ({"size": 0}, "--size 0: give 1 to"),
        ({"samples": "few"}, "--samples 'few' is not a number"),
        ({"effort": ["fast"]}, "is not a name; give a string"),
        ({"moved": "all"}, "--moved 'all': choose one of"),
        ({"pin": ("/0/Conv=2",)}, "pin is not an option; the nearest is pins"),
        ({"weight_only": True}, "weight_only is not an option; the nearest is weights_only"),
        ({"curves": 3}, "curves is a int; give a path"),
    ],
)
def test_other_values_are_refused(
    model: onnx.ModelProto, x: NDArray[np.float32], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(rdoq_onnx.RdoqError) as caught:
        rdoq_onnx.quantize(model, {"input": x}, **options)
    assert said in str(caught.value)


def test_what_allocate_and_emit_refuse(model: onnx.ModelProto, measurement: rdoq_onnx.Measurement) -> None:
    for options in ({"activation_bits": "none"}, {"pins": {"/0/Conv[0:99]": 2}}, {"size": "much"}, {"joint": 1}):
        with pytest.raises(rdoq_onnx.RdoqError):
            rdoq_onnx.allocate(measurement, **options)
    with pytest.raises(rdoq_onnx.RdoqError, match="--storage 'zip': choose one of"):
        rdoq_onnx.emit(model, rdoq_onnx.allocate(measurement, bits="4"), storage="zip")  # type: ignore[arg-type]
    with pytest.raises(rdoq_onnx.RdoqError, match="the model is a int; give a path"):
        rdoq_onnx.quantize(3)  # type: ignore[arg-type]


def test_a_tensor_that_is_always_zero_spoils_nothing() -> None:
    """Behind a dead Relu a layer gives its bias, which has to fit into INT32 at the scale of those zeros."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[N,3,6,6] x) => (float[N,2,6,6] y)
        { a = Conv (x, w0, b0) b = Relu (a) c = Conv (b, w1, b1) d = Relu (c) e = Conv (x, w2) f = Add (d, e)
          g = Relu (f) y = Conv (g, w3) }""")
    rng = np.random.default_rng(0)
    shapes = {"w0": (3, 3, 1, 1), "w1": (3, 3, 1, 1), "w2": (3, 3, 1, 1), "w3": (2, 3, 1, 1)}
    values = {n: rng.standard_normal(s) for n, s in shapes.items()} | {"b0": [-30.0] * 3, "b1": [0.5, 1.0, 2.0]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), n) for n, v in values.items())
    x = rng.standard_normal((40, 3, 6, 6)).astype(np.float32)
    assert rdoq_onnx.quantize(model, {"x": x}, bits=8, effort="fast").report.sqnr_db > 30


def test_progress_is_told_and_logged(
    model: onnx.ModelProto, x: NDArray[np.float32], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, int]] = []
    caplog.set_level("INFO", "rdoq_onnx")
    loader = [(row, np.int64(0)) for row in x]
    result = rdoq_onnx.quantize(
        model, loader, bits=4, effort="fast", threads=1, progress=lambda *step: told.append(step)
    )
    steps = list(dict.fromkeys(name for name, _, _ in told))
    assert {"normalize", "emit", "verify"} <= set(steps)
    for name in steps:
        parts = [(done, total) for step, done, total in told if step == name]
        assert parts[0][0] == 0
        assert parts[-1][0] == parts[-1][1]
    assert any(record.name == "rdoq_onnx" and "layers" in record.message for record in caplog.records)
    assert result.report.agreement is not None
    assert result.report.agreement.accuracy is not None  # the labels of the loader


def test_representations_are_short(measurement: rdoq_onnx.Measurement, model: onnx.ModelProto) -> None:
    allocation = rdoq_onnx.allocate(measurement, bits=4)
    result = rdoq_onnx.quantize(model, CALIBRATION, bits=4, samples=24, effort="fast", threads=1)
    for value in (measurement, allocation, result, result.report):
        assert len(repr(value)) < 120
    assert f"{result.report.sqnr_db:.2f} dB" in repr(result)
    assert "activations 4.00 bits" in repr(allocation)


def test_importing_loads_nothing_that_is_slow(tmp_path: Path) -> None:
    code = (
        "import sys, rdoq_onnx; slow = {'onnx', 'numpy', 'onnxruntime', 'click', 'rich'} & set(sys.modules); "
        "assert not slow, slow; assert rdoq_onnx.errors.RdoqError is rdoq_onnx.RdoqError; "
        "assert set(rdoq_onnx.__all__) <= set(dir(rdoq_onnx)); assert rdoq_onnx.quantize.__name__ == 'quantize'; "
        "assert not hasattr(rdoq_onnx, 'quantise')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)  # the source folder lacks passes/
