"""Products of two activations run on integers, or stay in float where that costs more than it gives."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.curves import product_fallback
from rdoq_onnx.system.progress import Progress
from tests.conftest import deviation

CONFIG = Config(weight_bits=7, activation_bits=8, effort="fast", threads=1)


@pytest.fixture(scope="module")
def model():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 6, 16] x) => (float[N, 6, 8] y) {
        q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) t = Transpose <perm = [0, 2, 1]> (k)
        [scores] s = MatMul (q, t) m = Mul (s, scale) p = Softmax (m) [mix] c = MatMul (p, v) y = MatMul (c, w) }""")
    rng = np.random.default_rng(0)
    values = {n: 0.3 * rng.standard_normal((16, 16), np.float32) for n in ("wq", "wk", "wv")}
    values |= {"w": 0.3 * rng.standard_normal((16, 8), np.float32), "scale": np.float32(0.25)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in values.items())
    return model


@pytest.fixture(scope="module")
def samples():
    return {"x": np.random.default_rng(1).standard_normal((64, 6, 16)).astype(np.float32)}


@pytest.fixture
def paying(monkeypatch):
    monkeypatch.setattr(product_fallback, "_HARMLESS", 1.0)


@pytest.fixture
def costly(monkeypatch):
    monkeypatch.setattr(product_fallback, "_HARMLESS", 0.0)
    monkeypatch.setattr(product_fallback, "_WORTH", 0.0)


def quantized(model, samples, config=CONFIG):
    return pipeline.run(model, samples, config, Progress())


@pytest.mark.usefixtures("paying")
def test_products_run_on_integers(model, samples, ort_run):
    result = quantized(model, samples)
    assert len(result.curves.network.products) == 2
    assert not any("cost it more" in s.reason for s in result.report.skipped)
    nodes = {n.name: n for n in result.model.graph.node}
    producer = {o: n.op_type for n in result.model.graph.node for o in n.output}
    for name in ("scores", "mix"):
        assert [producer[i] for i in nodes[name].input] == ["DequantizeLinear"] * 2
    kernels = result.report.kernels
    assert kernels.get("MatMulIntegerToFloat", 0) + kernels.get("QLinearMatMul", 0) == 4 + 2
    exact, fused = ort_run(result.model, samples, "basic"), ort_run(result.model, samples, "all")
    assert deviation(fused, exact) < 0.01
    assert result.report.sqnr_db > 25


@pytest.mark.usefixtures("costly")
def test_a_product_that_does_not_pay_stays_in_float(model, samples):
    result = quantized(model, samples)
    assert result.curves.network.products == ()
    listed = {s.node: s.reason for s in result.report.skipped if "integers would cost it more" in s.reason}
    assert set(listed) == {"scores", "mix"}
    assert "--pin" in listed["scores"]


@pytest.mark.usefixtures("costly")
def test_a_pin_quantizes_it_anyway(model, samples):
    result = quantized(model, samples, replace(CONFIG, pins=(("p", 8),)))
    assert [p.node for p in result.curves.network.products] == ["mix"]


@pytest.mark.usefixtures("paying")
def test_attention_weights_are_clipped_below_their_maximum(model, samples):
    quantizers = {m.activation.tensor: m.quantizers for m in quantized(model, samples).curves.activations}
    assert quantizers["p"][8].range[0] == 0
    assert quantizers["p"][8].range[1] <= 1 + 1e-6
    assert quantizers["p"][2].range[1] < 0.8
