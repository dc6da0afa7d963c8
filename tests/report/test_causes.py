"""Advice names the cause, in runs of small networks that each have one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.report import causes

WORDS = """<ir_version: 8, opset_import: ["": 17]> g (int64[n, 4] ids) => (float[n, 4, 10] y)
{ e = Gather (table, ids) [first] h = MatMul (e, a) r = Relu (h) [second] y = MatMul (r, b) }"""
LINE = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 16] x) => (float[n, 40] y)
{ [first] h = MatMul (x, a) r = Relu (h) [second] y = MatMul (r, b) }"""
SORTED = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 16] x) => (float[n, 5] best, float[n, 40] y)
<int64[1] five = {5}>
{ [first] h = MatMul (x, a) r = Relu (h) [second] y = MatMul (r, b) s = Sigmoid (y)
  best, places = TopK <axis = 1> (s, five) }"""


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def run(text: str, feeds: dict[str, Any], weights: dict[str, tuple[int, ...]], **options: Any) -> Any:
    model = parser.parse_model(text)
    for name, shape in weights.items():
        value = random(*shape) / np.float32(shape[0] ** 0.5 if name != "table" else 1)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return rdoq_onnx.quantize(model, feeds, threads=1, effort="fast", **options)


def words(count: int = 128, **options: Any) -> Any:
    ids = np.random.default_rng(0).integers(0, 200, (count, 4))
    weights = {"table": (200, 32), "a": (32, 64), "b": (64, 10)}
    return run(WORDS, {"ids": ids}, weights, weights_only=True, weight_bits=8, **options)


def line(text: str = LINE, **options: Any) -> Any:
    return run(text, {"x": random(128, 16)}, {"a": (16, 64), "b": (64, 40)}, **options)


def advice(result: Any, word: str) -> list[str]:
    return [text for text in result.report.advice if word in text]


def test_a_narrow_table() -> None:
    (text,) = advice(words(pins=(("table", 1),)), "pinned to 1 bit")
    assert text.startswith("layer Gather_0, pinned to 1 bit, causes ")
    assert "--pin Gather_0=" in text
    assert not advice(words(), "pinned to")


def test_few_held_out_samples() -> None:
    (text,) = advice(words(40), "held-out")
    assert text == "figures rest on 6 held-out samples, so they are rough: calibrate on more samples (40 now)"
    assert not advice(words(), "held-out")


def test_a_pinned_layer() -> None:
    result = line(weight_bits=6, pins=(("first", 1),))
    (text,) = advice(result, "pinned to")
    assert text.startswith("layer first, pinned to 1 bit, causes ")
    wider = line(weight_bits=6, pins=(("first", int(text.split("--pin first=")[1][0])),))
    assert wider.report.predicted < 0.55 * result.report.predicted
    assert not advice(line(weight_bits=6, pins=(("first", 7),)), "pinned to")


def test_rows_sorted_by_value() -> None:
    (text,) = advice(line(SORTED), "selects by value")
    assert text.startswith("output best holds rows that TopK selects")
    assert not advice(line(), "selects by value")


def test_a_part_far_below_the_others() -> None:
    result = line(SORTED)
    part = SimpleNamespace(name="y", output="y", sqnr_db=7.0)
    fine = SimpleNamespace(name="s", output="best", sqnr_db=37.0)
    report: Any = SimpleNamespace(parts=(part, fine))
    (text,) = causes.weak_part(result.allocation, report)
    assert text == (
        "output y has 7.0 dB where the others have 37.0 dB: give the layer that makes it more bits, e.g. --pin second=8"
    )
    assert causes.weak_part(result.allocation, SimpleNamespace(parts=(fine, fine))) == []  # type: ignore[arg-type]


def test_models_are_valid() -> None:
    for text in (WORDS, LINE, SORTED):
        onnx.shape_inference.infer_shapes(parser.parse_model(text), check_type=True)
