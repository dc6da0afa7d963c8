"""Candidates: every channel at every width, within the limits of kernels."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.api import allocate, measure
from rdoq_onnx.candidates.candidates import integer_limit, widest
from rdoq_onnx.config import Config
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.passes import run_passes
from tests.conftest import deviation

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4, 6, 6] x) => (float[N, 5] y)
{ z1 = Conv (x, w1, b1) a1 = Relu (z1) z2 = Conv <group = 2> (a1, w2) r = Add (z2, a1) a2 = Relu (r)
  z3 = ConvTranspose <group = 2> (a2, w3) a3 = Tanh (z3)
  p = GlobalAveragePool (a3) f = Flatten (p) y = MatMul (f, w4) }"""
SHAPES = {"w1": (6, 4, 1, 1), "b1": (6,), "w2": (6, 3, 1, 1), "w3": (6, 4, 2, 2), "w4": (8, 5)}


@pytest.fixture(scope="module")
def network():
    model = parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(s, np.float32), k) for k, s in SHAPES.items()
    )
    return model, {"x": rng.standard_normal((12, 4, 6, 6), np.float32)}


@pytest.fixture(scope="module", params=[True, False], ids=["integer activations", "float activations"])
def measured(request, network):
    model, samples = network
    return measure(model, samples, weights_only=not request.param, threads=1), request.param


def test_integers_fit_widths_and_kernels(measured):
    measurement, integer = measured
    limit = integer_limit(measurement.network)
    assert limit == (64 if integer else 127)
    for layer, table in ((x.layer, x.codes) for x in measurement.layers):
        assert list(table) == list(range(widest(measurement.network) + 1)) == list(range(8 if integer else 9))
        for bits, codes in table.items():
            q = codes.integers.astype(int)
            assert q.shape == (layer.linear.channels, np.prod(layer.linear.shape) // layer.linear.channels)
            low, high = np.minimum(q.min(axis=1), 0), np.maximum(q.max(axis=1), 0)
            assert (high - low).max() <= 2**bits - 1
            assert np.abs(q).max() <= limit
            assert np.isfinite(codes.scales).all()
            assert (codes.scales > 0).all()


def test_widest_codes_are_the_weights(measured):
    measurement, _ = measured
    tensors = {t.name: numpy_helper.to_array(t) for t in measurement.network.model.graph.initializer}
    for layer, table in ((x.layer, x.codes) for x in measurement.layers):
        rows = layer.linear.rows(tensors[layer.weight])
        error = np.linalg.norm(table[max(table)].values - rows) / np.linalg.norm(rows)
        assert error < 0.03
        assert not table[0].values.any()


def test_quantizers_of_activations(measured):
    measurement, integer = measured
    assert bool(measurement.activations) == integer
    for activation, table in ((x.activation, x.quantizers) for x in measurement.activations):
        assert list(table) == ([8] if activation.fusion else list(range(1, 9)))
        for bits, quantizer in table.items():
            assert (quantizer.bits, quantizer.low) == (bits, 0)
            if activation.tensor in ("a1", "a2"):
                assert quantizer.zero_point == 0
    if integer:
        assert [a.tensor for a in measurement.network.activations if a.fusion] == ["z2"]


def test_widths_offered(network):
    model, samples = network
    table = measure(model, samples, threads=1, widths=(2, 8))
    # 8 bits beside integer activations are 7, so that products of two fit 16 bits on every CPU.
    assert [list(x.codes) for x in table.layers] == [[2, 7]] * 4
    offered = np.isfinite(table.curves.distortion[: table.channels])
    assert np.flatnonzero(offered.any(axis=0)).tolist() == [2, 7]


BIASED = {
    "Conv": "i = Unsqueeze (x, last) z = Conv (i, w1, b1) t = Squeeze (z, last)",
    "Gemm": "t = Gemm <transB = 1> (x, m1, b1)",
    "MatMul and Add": "z = MatMul (x, t1) t = Add (b1, z)",
}


@pytest.mark.parametrize("kind", BIASED)
def test_bias_fits_its_integer(ort_run, kind):
    """Channels of tiny weights and a large bias: ONNX Runtime stores the bias in units of both scales."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3] x) => (float[N, 2] y) {{ {BIASED[kind]} a = Relu (t) y = MatMul (a, w2) }}""")
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    weight[1], weight[2] = 0, 1e-12
    values = {
        "m1": weight,
        "t1": weight.T.copy(),
        "w1": weight[:, :, None],
        "last": np.array([2]),
        "b1": np.array([0.1, 7, 5, -0.1], np.float32),
        "w2": rng.standard_normal((4, 2)).astype(np.float32),
    }
    read = {i for n in model.graph.node for i in n.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items() if k in read)
    samples = {"x": rng.standard_normal((24, 3), np.float32)}
    table = measure(model, samples, threads=1)
    assert table.network.activations[0].tensor == "x"
    step = min(q.scale for q in table.activations[0].quantizers.values())
    for codes in table.layers[0].codes.values():
        assert (np.abs(values["b1"]) / (codes.scales * step)).max() < 2**31
    emitted = quantized_model(allocate(table, bits=8))
    assert deviation(ort_run(emitted, samples, "all"), ort_run(model, samples)) < 0.03


def test_excluded_layers_have_no_candidates():
    model = run_passes(
        NORMALIZE,
        parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[2, 2] x) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] v = {1, 2, 3, 4}>
    { [one] z = MatMul (x, w) a = Relu (z) [two] y = MatMul (a, v) }"""),
    )
    network = analyse(model, Config(exclude=("one",)).selection)
    assert [x.name for x in network.layers] == ["two"]
    table = measure(model, {"x": np.eye(2, dtype=np.float32).repeat(4, axis=0)}, threads=1, exclude=("one",))
    assert len(table.layers) == 1


def test_candidates_are_deterministic(network):
    first, second = (measure(*network, threads=2) for _ in range(2))
    np.testing.assert_array_equal(first.curves.distortion, second.curves.distortion)
    for one, other in zip((x.codes for x in first.layers), (x.codes for x in second.layers), strict=True):
        for bits in one:
            np.testing.assert_array_equal(one[bits].integers, other[bits].integers)
            np.testing.assert_array_equal(one[bits].scales, other[bits].scales)
    assert first.activations == second.activations
