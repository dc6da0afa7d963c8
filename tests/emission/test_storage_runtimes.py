"""One file, one network: every storage and target, in ONNX Runtime at all levels, OpenVINO and onnx's evaluator.

u8 x s8 kernels agree as weights beside quantized activations are no greater than 64; what is left is rounding.
"""

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, version_converter
from onnx.reference import ReferenceEvaluator

import rdoq_onnx
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing import bit_rows
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.system import openvino_runtime
from rdoq_onnx.targets import TARGETS
from tests.conftest import LEVELS, ROOT, OrtRun
from tests.passes.packing.test_pack_weights import decoders

MODELS = ("digits_cnn", "digits_vit")
CASES = [
    (target, storage, weights_only)
    for target in TARGETS.values()
    for storage in target.storages
    for weights_only in (False, True)
    if weights_only or storage != "nbits"
]
NAMES = [f"{t.name} {s} {'weights only' if w else '8-bit activations'}" for t, s, w in CASES]


@cache
def allocation(model: str, target: str, weights_only: bool) -> rdoq_onnx.Allocation:
    """Widths that mix, few samples, little effort: what counts is that the runtimes agree."""
    options: dict[str, Any] = {"samples": 16, "effort": "fast", "target": target, "weights_only": weights_only}
    calibration = ROOT / "models" / "digits_calib.npz"
    measurement = rdoq_onnx.measure(ROOT / "models" / f"{model}.onnx", calibration, threads=1, **options)
    return rdoq_onnx.allocate(measurement, bits=8, weight_bits=3.3)


@cache
def emitted(model: str, target: str, storage: Any, weights_only: bool) -> onnx.ModelProto:
    return rdoq_onnx.emit(ROOT / "models" / f"{model}.onnx", allocation(model, target, weights_only), storage=storage)


@cache
def digits(count: int = 400) -> NDArray[np.float32]:
    """The first of the bundled test set's 1000 as the models take them."""
    with np.load(ROOT / "models" / "digits_test.npz") as data:
        scaled = (data["x"][:count] / np.float32(255) - data["mean"]) / data["std"]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def feeds_of(model: onnx.ModelProto, count: int | None = None) -> dict[str, NDArray[np.float32]]:
    return {model.graph.input[0].name: digits()[:count]}


def in_openvino(model: onnx.ModelProto, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    if not openvino_runtime.installed():
        pytest.skip("OpenVINO is not installed")
    return next(iter(openvino_runtime.load(model).run(feeds).values()))


def agree(got: NDArray[np.float32], expected: NDArray[np.float32], where: str) -> None:
    same = np.mean(got.argmax(axis=1) == expected.argmax(axis=1))
    assert same >= 0.995, f"{where}: {same:.1%} of the digits alike"
    # A value on the edge between two integers may round either way, and moves what follows by a step.
    power = np.mean(np.square(got - expected)) / np.mean(np.square(expected))
    assert power < 1e-3, f"{where}: {10 * np.log10(1 / power):.1f} dB"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("target", "storage", "weights_only"), CASES, ids=NAMES)
def test_runtimes_agree(ort_run: OrtRun, model: str, target: Any, storage: str, weights_only: bool) -> None:
    file = emitted(model, target.name, storage, weights_only)
    feeds = feeds_of(file)
    outputs = {level: ort_run(file, feeds, level)[0] for level in LEVELS}
    for level in LEVELS:
        agree(outputs[level], outputs["none"], level)
    if storage == "nbits":
        packed = ort_run(emitted(model, target.name, "packed", True), feeds, "all")[0]
        agree(outputs["all"], packed, "packed")
        return
    if any(t.data_type == TensorProto.INT2 for t in file.graph.initializer):
        pytest.skip("OpenVINO does not read INT2")
    agree(in_openvino(file, feeds), outputs["none"], "OpenVINO")


@pytest.mark.parametrize("model", MODELS)
def test_four_bits_on_the_whole_test_set(ort_run: OrtRun, model: str) -> None:
    calibration = ROOT / "models" / "digits_calib.npz"
    file = rdoq_onnx.quantize(ROOT / "models" / f"{model}.onnx", calibration, bits=4, effort="fast", threads=1).model
    feeds = {file.graph.input[0].name: digits(1000)}
    agree(in_openvino(file, feeds), ort_run(file, feeds, "all")[0], "OpenVINO")


@pytest.mark.parametrize("storage", ["packed", "native", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_converted_to_a_later_opset_and_in_the_reference_evaluator(ort_run: OrtRun, model: str, storage: str) -> None:
    """onnx's evaluator knows DequantizeLinear from opset 19 on, and its converter takes the file there."""
    file = emitted(model, "onnxruntime", storage, False)
    later = version_converter.convert_version(file, max(21, file.opset_import[0].version))
    feeds = feeds_of(file, 6)
    expected = ort_run(file, feeds, "none")[0]
    agree(ort_run(later, feeds, "all")[0], expected, "converted")
    (found,) = ReferenceEvaluator(later).run(None, feeds)
    agree(found, expected, "reference evaluator")


def test_every_byte_at_every_place_is_decoded_alike(ort_run: OrtRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 256 integers of a channel behind all that may be below it in its byte, which the decode rounds away."""
    monkeypatch.setattr(bit_rows, "_GROUP_NODES", -1000)
    monkeypatch.setattr(bit_rows, "_SHARED_NODES", 0)
    weights = {}
    for width in range(1, 9):
        for place in range(1, 8):
            pairs = np.meshgrid(*(np.arange(2**b) - 2 ** (b - 1) for b in (place, width)))
            weights[f"w{width}_{place}"] = (np.stack(pairs).reshape(2, -1).astype(np.int8), 0)
    model = run_passes([PackWeights(list(weights))], decoders(weights, opset=21))
    runs = {level: ort_run(model, {}, level) for level in LEVELS}
    runs["reference evaluator"] = ReferenceEvaluator(model).run(None, {})
    if openvino_runtime.installed():
        values = openvino_runtime.load(model).run({})
        runs["OpenVINO"] = [values[output.name] for output in model.graph.output]
    for where, outputs in runs.items():
        for got, (expected, _) in zip(outputs, weights.values(), strict=True):
            np.testing.assert_array_equal(got, expected, where)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_tied_table_and_its_head_share_what_stays_packed(ort_run: OrtRun, tokens: int) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (int64[N, T] ids) => (float[N, T, 96] y)
        { e = Gather (table, ids) a = MatMul (e, w) b = Tanh (a) y = MatMul (b, head) }"""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    table = rng.standard_normal((96, 64)).astype(np.float32)
    values = {"table": table, "head": np.ascontiguousarray(table.T), "w": rng.standard_normal((64, 64), np.float32) / 8}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in values.items())
    calibration = {"ids": rng.integers(0, 96, (24, 7))}
    options: dict[str, Any] = {"effort": "fast", "threads": 1, "weights_only": True}
    files = [rdoq_onnx.quantize(model, calibration, bits=4, storage=s, **options).model for s in ("nbits", "packed")]
    kinds = [n.op_type for n in files[0].graph.node]
    assert (kinds.count("MatMulNBits"), kinds.count("GatherBlockQuantized")) == (2, 1)
    assert sum(t.data_type == TensorProto.UINT8 and len(t.dims) == 3 for t in files[0].graph.initializer) == 2
    feeds = {"ids": calibration["ids"][:, :tokens]}
    found = {level: ort_run(files[0], feeds, level)[0] for level in LEVELS}
    floats = ort_run(model, feeds, "all")[0]
    for level in LEVELS:
        agree(found[level].reshape(-1, 96), found["none"].reshape(-1, 96), level)
        power = np.mean(np.square(found[level] - floats)) / np.mean(np.square(floats))
        assert power < 0.03, f"{level}: {10 * np.log10(1 / power):.1f} dB"
