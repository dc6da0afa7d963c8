"""The SQNR of layers: that of the last is the model's, and removed channels do not count."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.pipeline import Job
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.verification.layer_outputs import compare_layers, decibels
from tests.cases import RUNTIME
from tests.conftest import ROOT

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 6] x) => (float[N, 4] y) { [first] z = MatMul (x, w) [act] a = Tanh (z) [second] y = MatMul (a, v) }"""
RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.standard_normal((6, 5)), RNG.standard_normal((5, 4))
DATA = {"x": RNG.standard_normal((24, 6)).astype(np.float32)}


def model_of(first, second, text=TEXT):
    """The network with these weights."""
    model = parser.parse_model(text)
    for name, value in (("w", first), ("v", second)):
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return model


@pytest.fixture(scope="module")
def result():
    config = Config(weight_bits=4, activation_bits=8, threads=1, effort="fast")
    return Job.of(model_of(FIRST, SECOND), DATA, config, Progress()).result(config)


def test_the_report_has_them(result):
    layers = json.loads(result.report.to_json())["layers"]
    assert [layer["sqnr_db"] for layer in layers] == [layer.sqnr_db for layer in result.report.layers]
    assert all(layer["sqnr_db"] > 0 for layer in layers)
    assert json.loads(result.report.to_json())["layer_samples"] == result.report.layer_samples > 0


def test_the_last_layer_has_the_sqnr_of_the_model(result):
    held_out = Samples("test", DATA)
    exact, found = (
        RUNTIME.session(m, "basic").run(held_out.feeds(slice(None)), ["y"])[0]
        for m in (model_of(FIRST, SECOND), result.model)
    )
    outputs = compare_layers(Emission(result.model, "int8", {}, {}), result.curves, held_out.take(slice(0, 8)), RUNTIME)
    noise = np.square(found[:8].astype(np.float64) - exact[:8]).sum()
    assert outputs.samples == 8
    assert outputs.sqnr_db[1] == pytest.approx(10 * np.log10(np.square(exact[:8], dtype=float).sum() / noise), abs=1e-3)


def test_removed_channels_do_not_count(result):
    shorter = model_of(np.delete(FIRST, [1, 3], 1) * 1.1, np.delete(SECOND, [1, 3], 0))
    measurement = replace(result.curves, network=replace(result.curves.network, model=model_of(FIRST, SECOND)))
    emission = Emission(shorter, "int8", {"first": (1, 3)}, {})
    outputs = compare_layers(emission, measurement, Samples("test", DATA), RUNTIME)
    assert outputs.sqnr_db[0] == pytest.approx(20, abs=1e-3)  # each value is off by a tenth
    unknown = compare_layers(replace(emission, removed={}), measurement, Samples("test", DATA), RUNTIME)
    assert unknown.sqnr_db[0] is None


def test_a_tensor_that_the_emitted_model_lacks_has_none(result):
    text = TEXT.replace("z = MatMul (x, w) [act] a = Tanh (z)", "q = MatMul (x, w) [act] a = Tanh (q)")
    emission = Emission(model_of(FIRST, SECOND, text), "int8", {}, {})
    outputs = compare_layers(emission, result.curves, Samples("test", DATA), RUNTIME)
    assert outputs.sqnr_db[0] is None
    assert outputs.sqnr_db[1] is not None
    nothing = replace(result.curves, network=replace(result.curves.network, layers=()))
    assert compare_layers(emission, nothing, Samples("test", DATA), RUNTIME).sqnr_db == ()


def test_every_layer_of_a_network_is_compared():
    config = Config(weight_bits=3, activation_bits=6, samples=16, threads=1, effort="fast")
    model, calibration = (str(ROOT / "models" / name) for name in ("digits_vit.onnx", "digits_calib.npz"))
    result = Job.of(model, calibration, config, Progress()).result(config)
    found = [layer.sqnr_db for layer in result.report.layers]
    assert None not in found
    assert found[0] > found[-1]


def test_decibels():
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) is None
