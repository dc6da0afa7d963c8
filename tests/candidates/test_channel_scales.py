"""Channel scales leave a network's function unchanged, fold where they can, and make quantized networks better."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.scale_groups import find_groups
from rdoq_onnx.config import Config
from rdoq_onnx.curves import measure
from rdoq_onnx.curves.scaling import scaled
from rdoq_onnx.observation.shapes import shapes_of
from rdoq_onnx.passes import run_passes
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers
from tests.conftest import ROOT, deviation

RUNTIME = Runtime("cpu", 2)
CONFIG = Config(activation_bits=8, threads=2)
NARROW = Config(activation_bits=4, threads=2)
SPREAD = np.geomspace(1, 100, 8).astype(np.float32)  # outlier channels

TOKENS = "g (float[N, 4, 8] x) => (float[N, 4, 5] y)"
MAPS = "g (float[N, 8, 6, 6] x) => (float[N, 5, 6, 6] y)"
FOLDS = {
    "LayerNormalization": (TOKENS, "[n] h = LayerNormalization (x, s, b) [l] y = MatMul (h, w)", 0),
    "RMS normalization": (
        TOKENS,
        "q = Mul (x, x) m = ReduceMean <axes = [-1]> (q) e = Add (m, eps) r = Sqrt (e) d = Div (x, r) h = Mul (d, s) "
        "y = MatMul (h, w)",
        0,
    ),
    "two readers": (TOKENS, "h = LayerNormalization (x, s, b) p = MatMul (h, w) q = MatMul (h, w2) y = Mul (p, q)", 0),
    "linear layer": (TOKENS, "h = MatMul (x, v) c = Add (h, b) r = Relu (c) y = MatMul (r, w)", 0),
    "gate": (TOKENS, "h = MatMul (x, v) g = MatMul (x, v2) t = Sigmoid (g) r = Mul (h, t) y = MatMul (r, w)", 0),
    "square": (TOKENS, "h = MatMul (x, v) r = Mul (h, h) y = MatMul (r, w)", 1),
    "Gelu": (
        TOKENS,
        "h = MatMul (x, v) d = Div (h, two) e = Erf (d) p = Add (e, one) m = Mul (h, p) r = Mul (m, half) "
        "y = MatMul (r, w)",
        1,
    ),
    "residual stream": (
        TOKENS,
        "h = LayerNormalization (x, s, b) p = MatMul (h, v) t = Tanh (p) a = Add (h, t) y = MatMul (a, w)",
        2,
    ),
    "Elu": (MAPS, "h = Conv (x, k) r = Elu (h) y = Conv (r, k2)", 1),
    "squeeze and excite": (
        MAPS,
        "h = Conv (x, k) r = HardSwish (h) p = GlobalAveragePool (r) t = Conv (p, k) g = Sigmoid (t) m = Mul (r, g) "
        "y = Conv (m, k2)",
        2,  # of the gate, and of the pooled values: both are small
    ),
}
WEIGHTS = {
    "s": SPREAD,
    "b": np.zeros(8, np.float32),
    "v": (8, 8),
    "v2": (8, 8),
    "w": (8, 5),
    "w2": (8, 5),
    "k": (8, 8, 1, 1),
    "k2": (5, 8, 1, 1),
    "two": np.float32(1.4),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "eps": np.float32(1e-5),
}


def parse(graph, nodes):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph} {{ {nodes} }}')
    rng = np.random.default_rng(0)
    used = {i for n in model.graph.node for i in n.input}
    for name, value in WEIGHTS.items():
        if isinstance(value, tuple):
            value = rng.standard_normal(value, np.float32)
            if name in ("v", "k"):  # outlier channels
                value = value * (SPREAD if name == "v" else SPREAD[:, None, None, None])
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return run_passes(NORMALIZE, model)


def inputs(model):
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return {"x": np.random.default_rng(1).standard_normal((24, *shape)).astype(np.float32)}


def rescaled(model, feeds, config=CONFIG):
    network = analyse(model, config.selection)
    with workers(2) as pool:
        return network, scaled(network, config, Samples("test", feeds), RUNTIME, pool)


@pytest.mark.parametrize("kind", FOLDS)
def test_function_stays_and_scales_fold(kind, ort_run):
    graph, nodes, most = FOLDS[kind]
    model = parse(graph, nodes)
    feeds = inputs(model)
    before, after = rescaled(model, feeds)
    assert deviation(ort_run(after.model, feeds, "none"), ort_run(model, feeds, "none")) < 1e-5
    assert after.model != before.model

    def muls(network):
        return sum(n.op_type == "Mul" for n in network.model.graph.node)

    assert muls(after) - muls(before) <= most
    assert [a.tensor for a in after.activations] == [a.tensor for a in before.activations]


def test_a_hard_swish_on_integers_gets_no_mul():
    model = parse(MAPS, "h = Conv (x, k) r = HardSwish (h) y = Conv (r, k2)")
    ops = [[n.op_type for n in rescaled(model, inputs(model), c)[1].model.graph.node] for c in (CONFIG, NARROW)]
    assert ops == [["Conv", "HardSwish", "Conv"], ["Conv", "HardSwish", "Mul", "Conv"]]


ATTENTION = """g (float[N, 4, 8] x) => (float[N, 4, 5] y) {
    v0 = MatMul (x, v) v1 = Add (v0, b) v2r = Reshape (v1, heads) vh = Transpose <perm = [0, 2, 1, 3]> (v2r)
    q0 = MatMul (x, v2) q1 = Reshape (q0, heads) qh = Transpose <perm = [0, 2, 1, 3]> (q1)
    kh = Transpose <perm = [0, 2, 3, 1]> (q1) a = MatMul (qh, kh) p = Softmax (a)
    c = MatMul (p, vh) t = Transpose <perm = [0, 2, 1, 3]> (c) r = Reshape (t, joined) y = MatMul (r, w) }"""


def weighted(text, values):
    """Parse and normalize a graph with these initializers."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    return run_passes(NORMALIZE, model)


def weights_around(model, ort_run):
    """Scale channels; return the initializers before and after. The function stays the same."""
    feeds = inputs(model)
    networks = rescaled(model, feeds)
    assert deviation(ort_run(networks[1].model, feeds, "none"), ort_run(model, feeds, "none")) < 1e-5
    before, after = ([n.op_type for n in network.model.graph.node] for network in networks)
    weights = [{t.name: numpy_helper.to_array(t) for t in network.model.graph.initializer} for network in networks]
    return before, after, *weights


def test_context_of_attention_folds_into_the_values(ort_run):
    rng = np.random.default_rng(0)
    values = {
        "v": rng.standard_normal((8, 8), np.float32) * SPREAD,
        "v2": rng.standard_normal((8, 8), np.float32),
        "w": rng.standard_normal((8, 5), np.float32),
        "b": SPREAD,
        "heads": np.array([0, 0, 2, 4]),
        "joined": np.array([0, 0, 8]),
    }
    before, after, _, weights = weights_around(weighted(ATTENTION, values), ort_run)
    assert after == before
    wide = np.abs(weights["v"]).max(axis=0)
    assert wide.max() / wide.min() < 50  # of a hundred before


def test_queries_and_keys_share_their_channels(ort_run):
    """Outliers of both go where the other side has room; no node is added."""
    text = ATTENTION.replace(
        "kh = Transpose <perm = [0, 2, 3, 1]> (q1)",
        "k0 = MatMul (x, v3) k1 = Reshape (k0, heads) kh = Transpose <perm = [0, 2, 3, 1]> (k1)",
    )
    rng = np.random.default_rng(0)
    values = {
        "v": rng.standard_normal((8, 8), np.float32),
        "v2": rng.standard_normal((8, 8), np.float32) * SPREAD / 100,
        "v3": rng.standard_normal((8, 8), np.float32) / SPREAD,
        "w": rng.standard_normal((8, 5), np.float32),
        "b": np.zeros(8, np.float32),
        "heads": np.array([0, 0, 2, 4]),
        "joined": np.array([0, 0, 8]),
    }
    before, after, _, weights = weights_around(weighted(text, values), ort_run)
    assert after == before
    for name in ("v2", "v3"):
        wide = np.abs(weights[name]).max(axis=0)
        assert wide.max() / wide.min() < 20  # of a hundred before


def test_queries_and_keys_of_one_weight_share_their_channels(ort_run):
    text = """g (float[N, 4, 8] x) => (float[N, 4, 8] y) {
        m = MatMul (x, v) h = Reshape (m, heads) qh, kh = Split <axis = 2> (h)
        q = Transpose <perm = [0, 3, 1, 2, 4]> (qh) qs = Squeeze (q, last)
        k = Transpose <perm = [0, 3, 2, 4, 1]> (kh) ks = Squeeze (k, second)
        a = MatMul (qs, ks) p = Softmax (a) r = MatMul (x, w) c = ReduceMean <axes = [1], keepdims = 0> (p)
        y = MatMul (c, r) }"""
    rng = np.random.default_rng(0)
    wide = np.concatenate([np.tile(SPREAD[::2], 2) / 100, np.tile(1 / SPREAD[::2], 2)])
    values = {
        "v": rng.standard_normal((8, 16), np.float32) * wide,
        "w": rng.standard_normal((8, 8), np.float32),
        "heads": np.array([0, 0, 2, 2, 4]),
        "last": np.array([3]),
        "second": np.array([2]),
    }
    *_, before, after = weights_around(weighted(text, values), ort_run)
    changed = (after["v"] / before["v"])[0]
    np.testing.assert_allclose(changed[:8] * changed[8:], 1, rtol=1e-5)
    assert changed[:8].max() / changed[:8].min() > 2


def test_float_activations_keep_their_scales():
    model = parse(*FOLDS["linear layer"][:2])
    config = Config(activation_bits=None, threads=2)
    before, after = rescaled(model, inputs(model), config)
    assert after.model is before.model


def test_what_other_nodes_read_in_float_is_in_no_group():
    graph, nodes, _ = FOLDS["residual stream"]
    network = analyse(parse(graph, nodes), CONFIG.selection)
    samples = Samples("test", inputs(network.model))
    (group, _) = find_groups(network, shapes_of(network.model, samples, RUNTIME))
    assert [p.name for p in group.multiplied] == ["h/quantized"]


def test_quantized_transformer_gains(monkeypatch):
    """SQNR of the bundled transformer on its test images with scales, over that without them."""
    models = ROOT / "models"
    options = {"bits": 4, "effort": "fast", "threads": 2, "samples": 96, "validation": models / "digits_test.npz"}
    model, samples = models / "digits_vit.onnx", models / "digits_calib.npz"
    better = rdoq_onnx.quantize(model, samples, **options).report.sqnr_db
    monkeypatch.setattr(measure, "scaled", lambda network, *_: network)
    assert better > rdoq_onnx.quantize(model, samples, **options).report.sqnr_db + 1
