"""Predictions of parts: they add up, and say which part a width ruins."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 12] x) => (float[N, 300] loud, float[N, 2] quiet) {
    [l] h = MatMul (x, w) loud = Mul (h, k) [q] quiet = MatMul (x, v) }"""


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    made = parser.parse_model(TEXT)
    for name, shape in (("w", (12, 300)), ("v", (12, 2)), ("k", ())):
        made.graph.initializer.append(
            numpy_helper.from_array(100 * rng.standard_normal(shape).astype(np.float32), name)
        )
    return made


@pytest.mark.parametrize(("pinned", "worse"), [("q", 1), ("l", 0)])
def test_the_part_behind_a_narrow_layer_is_predicted_to_suffer(model, pinned, worse):
    x = np.random.default_rng(1).standard_normal((80, 12)).astype(np.float32)
    report = rdoq_onnx.quantize(
        model, {"x": x}, weight_bits=6, weights_only=True, pins=((pinned, 2),), effort="fast", threads=1
    ).report
    predicted, measured = ([getattr(part, key) for part in report.parts] for key in ("predicted", "measured"))
    assert sum(predicted) == pytest.approx(report.predicted)
    assert sum(measured) == pytest.approx(report.measured)
    for values in (predicted, measured):
        assert values[worse] > 10 * values[1 - worse]
    assert report.parts[worse].sqnr_db == report.sqnr_db < report.parts[1 - worse].sqnr_db
