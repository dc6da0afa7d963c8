"""Activations and layers that 8 bits would ruin stay in float with a reason, unless pinned."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.curves.float_fallback import in_float
from rdoq_onnx.curves.measure import restored, stored_fields
from rdoq_onnx.curves.measurement import FloatFallback
from rdoq_onnx.errors import ModelError
from rdoq_onnx.estimate.dry_run import dry_run, lines
from rdoq_onnx.system.progress import Progress
from tests.analysis.test_analyse import find

NARROW = 15  # channels beside a wide one, which does not matter
CONFIG = Config(weight_bits=6, activation_bits=8, effort="fast", threads=1)


@pytest.fixture(scope="module")
def model():
    """x -> a (one channel ten thousand times as wide as the others) -> Relu -> y, which hardly uses the wide one.

    The Pad keeps the channels from scales of their own.
    """
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 12] x) => (float[N, 5] y) {
        a = MatMul (x, v) r = Relu (a) q = Pad (r, pads) h = MatMul (q, w) y = Tanh (h) }""")
    rng = np.random.default_rng(0)
    pads = np.array([0, 0, 0, 1])
    v, w = rng.standard_normal((12, NARROW + 1), np.float32), 0.1 * rng.standard_normal((NARROW + 1, 5), np.float32)
    v[:, -1] *= 1e4
    w[-1] *= 1e-8
    w = np.concatenate([w, np.full((1, 5), 0.1, np.float32)])
    model.graph.initializer.extend(numpy_helper.from_array(t, n) for t, n in ((v, "v"), (w, "w"), (pads, "pads")))
    return model


@pytest.fixture(scope="module")
def samples():
    return {"x": np.random.default_rng(1).standard_normal((64, 12)).astype(np.float32)}


def test_a_tensor_that_8_bits_ruin_stays_in_float(model, samples):
    result = pipeline.run(model, samples, CONFIG, Progress())
    assert list(result.curves.fallback.tensors) == ["r"]
    (skip,) = [s for s in result.report.skipped if "only its weights" in s.reason]
    assert skip.op_type == "MatMul"
    assert "'r'" in skip.reason
    assert "dB; --pin r=8" in skip.reason
    assert result.report.sqnr_db > 25
    types = [n.op_type for n in result.model.graph.node]
    assert types.count("QuantizeLinear") == 1  # x alone


LOGARITHM = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 12] x) => (float[N, 5] y, float[N, 5] t) {
    z = MatMul (x, w) square = Mul (z, z) positive = Add (square, tiny) y = Log (positive)
    h = MatMul (x, v) t = Tanh (h) }"""


@pytest.fixture(scope="module")
def logarithm():
    """The weights of z nearly cancel, and a logarithm amplifies the difference."""
    model = parser.parse_model(LOGARITHM)
    rng = np.random.default_rng(2)
    half, v = rng.standard_normal((6, 5), np.float32), rng.standard_normal((12, 5), np.float32)
    w = np.concatenate([half, 1e-3 * rng.standard_normal((6, 5), np.float32) - half])
    for name, value in (("w", w), ("v", v), ("tiny", np.array([1e-12], np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    x = np.random.default_rng(3).standard_normal((64, 6)).astype(np.float32)
    return model, {"x": np.concatenate([x, x], axis=1)}


def test_a_layer_that_8_bits_ruin_stays_in_float(logarithm):
    model, samples = logarithm
    result = pipeline.run(model, samples, replace(CONFIG, activation_bits=None, weight_bits=8), Progress())
    assert list(result.curves.fallback.layers) == ["MatMul_0"]
    (skip,) = result.report.skipped
    assert (skip.node, skip.op_type) == ("MatMul_0", "MatMul")
    assert "dB; --pin MatMul_0=8" in skip.reason
    assert result.report.sqnr_db > 35
    assert [layer.name for layer in result.report.layers] == ["MatMul_1"]


def test_a_node_is_reported_once(logarithm):
    """As in float altogether, not as one whose weights are quantized."""
    model, samples = logarithm
    skipped = pipeline.run(model, samples, replace(CONFIG, weight_bits=7), Progress()).report.skipped
    assert [s.node for s in skipped].count("MatMul_0") == 1
    assert "only its weights" not in next(s.reason for s in skipped if s.node == "MatMul_0")


def test_no_quantizer_behind_a_convolution_of_float_inputs():
    network = find(
        """g (float[1, 4, 6, 6] x) => (float y, float u)
        { z = Conv (x, w1) a = Relu (z) b = Conv (a, w2) y = Tanh (b) c = Conv (x, w3) u = Tanh (c) }""",
        **{f"w{k}": (4, 4, 1, 1) for k in (1, 2, 3)},
    )
    assert [a.tensor for a in network.activations] == ["x", "a", "b", "c"]
    remaining = in_float(network, FloatFallback({"a": 0.01}, {}))
    assert [a.tensor for a in remaining.activations] == ["x", "c"]
    assert len(remaining.layers) == 3


def test_the_choice_holds_whatever_the_bits(logarithm):
    """It is made at full width; fewer bits are the user's choice."""
    model, samples = logarithm
    result = pipeline.run(model, samples, replace(CONFIG, activation_bits=None, weight_bits=2), Progress())
    assert list(result.curves.fallback.layers) == ["MatMul_0"]
    narrow = replace(CONFIG, activation_bits=None, weight_bits=2, widths=(0, 1, 2, 3))
    assert not pipeline.run(model, samples, narrow, Progress()).curves.fallback.layers


def test_a_model_without_a_quantizable_layer_is_rejected(logarithm):
    model, samples = logarithm
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    del alone.graph.node[4:], alone.graph.output[1:]
    with pytest.raises(ModelError, match=r"no layer can be quantized: 'MatMul_0' alone, at full width, .* --pin"):
        pipeline.run(alone, samples, replace(CONFIG, activation_bits=None), Progress())


def test_a_pin_quantizes_it_anyway(model, samples):
    config = replace(CONFIG, pins=(("r", 8),))
    result = pipeline.run(model, samples, config, Progress())
    assert not result.curves.fallback.tensors
    assert not result.report.skipped
    assert result.report.sqnr_db < 20


def test_the_fallback_is_stored_with_the_curves(model, samples):
    measurement = pipeline.run(model, samples, CONFIG, Progress()).curves
    again = restored(stored_fields(measurement), measurement.source, CONFIG, measurement.scratch)
    assert again.network.activations == measurement.network.activations
    assert again.network.skipped == measurement.network.skipped


EMPTY = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3, 12] x) => (float[N, M, 5] y) <int64[1] start = {0}, int64[1] axis = {1}> {
    h = MatMul (x, v) none = Slice (h, start, start, axis) e = MatMul (none, u) r = Relu (e) again = MatMul (r, t)
    c = Concat <axis = 1> (again, h) y = MatMul (c, w) }"""


@pytest.fixture(scope="module")
def empty():
    """Two layers whose inputs have no elements."""
    model = parser.parse_model(EMPTY)
    rng = np.random.default_rng(0)
    shapes = {"v": (12, 8), "u": (8, 6), "t": (6, 8), "w": (8, 5)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in arrays.items())
    return model, {"x": rng.standard_normal((32, 3, 12), np.float32)}


@pytest.mark.parametrize("changes", [{}, {"activation_bits": None}, {"measure": "probe"}, {"effort": "best"}], ids=str)
def test_layers_fed_by_no_elements_stay_in_float(empty, changes):
    result = pipeline.run(*empty, replace(CONFIG, **changes), Progress())
    assert result.report.sqnr_db > 25
    assert [layer.name for layer in result.curves.network.layers] == ["MatMul_0", "MatMul_3"]
    assert [s.node for s in result.report.skipped] == ["MatMul_1", "MatMul_2"]
    assert all("has no elements on these samples" in s.reason for s in result.report.skipped)
    again = restored(
        stored_fields(result.curves), result.curves.source, replace(CONFIG, **changes), result.curves.scratch
    )
    assert again.network.skipped == result.curves.network.skipped


def test_a_dry_run_lists_layers_fed_by_no_elements(empty):
    text = "\n".join(lines(dry_run(*empty, CONFIG)))
    assert "MatMul_2: an input of 'MatMul_2' has no elements" in text


def test_no_layer_is_fed(empty):
    _, samples = empty
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3, 12] x) => (float[N, M, 12] y) <int64[1] start = {0}, int64[1] axis = {1}> {
        none = Slice (x, start, start, axis) e = MatMul (none, w) r = Relu (x) y = Concat <axis = 1> (e, r) }""")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((12, 12), np.float32), "w"))
    with pytest.raises(ModelError, match="no layer can be quantized: an input of 'MatMul_0' has no elements"):
        pipeline.run(model, samples, CONFIG, Progress())


@pytest.mark.parametrize("share", [1 / 20, 1 / 4])
def test_quiet_samples_in_front_of_a_normalization_count(share):
    """8 bits for all samples round the quiet ones to zero, where the derivative in their own direction vanishes."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 12] x) => (float[N, 5] y) <float tiny = {1e-9}> {
        a = MatMul (x, v) s = Mul (a, a) m = ReduceMean <axes = [1]> (s) e = Add (m, tiny) d = Sqrt (e) n = Div (a, d)
        y = MatMul (n, w) }""")
    rng = np.random.default_rng(0)
    arrays = {"v": rng.standard_normal((12, 16), np.float32), "w": rng.standard_normal((16, 5), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(t, n) for n, t in arrays.items())
    x = rng.standard_normal((120, 12), np.float32)
    x[:: round(1 / share)] *= 1e-3
    result = pipeline.run(model, {"x": x}, CONFIG, Progress())
    assert "x" in result.curves.fallback.tensors
    assert result.report.sqnr_db > 25
    assert result.curves.observation.quiet
