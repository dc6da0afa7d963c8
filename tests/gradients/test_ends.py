"""Reverse passes of the divergence: the squared error of their ends is the divergence to second order."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import parser

import rdoq_onnx
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.gradients.ends import ends_of
from rdoq_onnx.observation.distortion import metric_of
from rdoq_onnx.observation.parts import find_parts
from tests.conftest import ROOT

MODEL = parser.parse_model(
    """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 3, 5] z, float[N, 2] past) => (float[N, 3, 5] logits, float[N, 2] past_out)
    { logits = LeakyRelu <alpha = 1.0> (z) past_out = Relu (past) }"""
)


def metric_and_values():
    rng = np.random.default_rng(0)
    values = {"logits": 2 * rng.standard_normal((4, 3, 5), np.float32), "past_out": np.ones((4, 2), np.float32)}
    return metric_of(find_parts(MODEL), [(4, values)], 4), values


def test_the_divergence_is_a_mean_over_rows_and_no_cache_counts():
    metric, values = metric_and_values()
    other = {"logits": values["logits"] + np.arange(5, dtype=np.float32) / 10, "past_out": 0 * values["past_out"]}
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (values["logits"], other["logits"]))
    by_hand = (p * np.log(p / q)).sum(axis=-1).mean(axis=1)
    pair = [[v[name] for name in metric.outputs] for v in (other, values)]
    np.testing.assert_allclose(metric.divergence.errors(*pair, 4), by_hand, rtol=1e-5)
    assert metric.name == "mse"
    assert metric.errors(*pair, 4).mean() > metric.divergence.errors(*pair, 4).mean()
    assert metric.divergence.signal == metric.rows.power != metric.signal


def test_the_squared_error_of_the_ends_is_the_divergence():
    metric, values = metric_and_values()
    model, ends = ends_of(MODEL, metric.divergence)
    assert list(ends) == [0]
    model.graph.output[0].name = ends[0]
    del model.graph.output[1:]
    model.graph.output[0].ClearField("type")
    session = ort.InferenceSession(model.SerializeToString())
    before = values["logits"]
    after = before + 1e-2 * np.random.default_rng(1).standard_normal(before.shape, np.float32)
    past = np.ones((4, 2), np.float32)
    phi = [session.run(None, {"z": z, "past": past})[0].astype(np.float64) for z in (before, after)]
    weight = metric.divergence.factors[0]
    squares = weight**2 * np.square(phi[1] - phi[0]).sum() / 4 / metric.elements
    pair = [after, values["past_out"]], [before, values["past_out"]]
    assert squares == pytest.approx(metric.divergence.errors(*pair, 4).mean(), rel=0.05)


def test_the_squared_error_begins_at_the_outputs_themselves():
    metric, _ = metric_and_values()
    model, ends = ends_of(MODEL, metric)
    assert model is MODEL
    assert tuple(ends.values()) == metric.outputs


def run(**settings):
    calibration = ROOT / "models" / "digits_calib.npz"
    return rdoq_onnx.quantize(ROOT / "models" / "digits_cnn.onnx", calibration, samples=48, effort="fast", **settings)


def test_curves_of_the_divergence_predict_it():
    report = run(bits=5, distortion="kl").report
    assert report.metric == "kl"
    assert report.predicted == report.divergence.predicted
    assert report.measured == report.divergence.measured
    assert 0.2 < report.measured / report.predicted < 5


def test_what_has_no_logits_is_refused(tmp_path):
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}>
        { a = MatMul (x, w) y = Tanh (a) }"""
    )
    samples = {"x": np.random.default_rng(0).standard_normal((8, 4), np.float32)}
    with pytest.raises(ConfigError, match="--distortion kl: output 'y' holds no rows of logits"):
        rdoq_onnx.quantize(model, samples, distortion="kl")
    report = rdoq_onnx.quantize(model, samples, distortion="auto", effort="fast").report
    assert report.metric == "mse"
    assert report.divergence is None


def test_the_weights_of_a_part_alone_add_up():
    metric, values = metric_and_values()
    names = metric.outputs
    other = [values[n] * 1.1 for n in names]
    own = metric.divergence.part_errors(other, [values[n] for n in names], 4)
    alone = metric.divergence.of_part(0)
    np.testing.assert_allclose(alone.errors(other[:1], [values[names[0]]], 4), own[:, 0])
    assert replace(alone, name="mse").signal == pytest.approx(metric.power / 2)
