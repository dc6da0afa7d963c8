"""Whole runs on models with fused operators: as good as on the same networks without them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.transformers.optimizer import optimize_model

from rdoq_onnx.api import Result, allocate, emit, measure, quantize
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.unfusing.unfuse import Unfuse
from tests.conftest import ROOT, OrtRun, load_plays, plays_feeds
from tests.fused import Case
from tests.genai import DEPTH, genai_decoder
from tests.test_decoder import continued, divergence, named

FAST = {"effort": "fast", "samples": 48, "threads": 1}
SETTINGS = [{"weight_bits": 4, "activation_bits": "none"}, {"bits": 8}, {"bits": 4}]


def types(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def names(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    return [i.name for i in model.graph.input], [o.name for o in model.graph.output]


@pytest.mark.parametrize(("options", "least"), [*zip(SETTINGS[:2], (18, 26), strict=True)], ids=["W4", "W8A8"])
def test_decoder_of_the_genai_builder(options: dict[str, Any], least: float, ort_run: OrtRun) -> None:
    """`least` is what test_decoder.py asks of the same decoder without fused operators."""
    fused = genai_decoder()
    calibration = {"input_ids": load_plays("calib")}
    result = quantize(fused, calibration=calibration, **options, **FAST)
    assert result.report.sqnr_db > least
    assert [part.name for part in result.report.parts] == ["logits", "caches"]
    assert result.report.probed == {}
    assert result.report.supplied[0] == "attention_mask"
    assert names(result.model) == names(fused)
    assert types(result.model)["GroupQueryAttention"] == DEPTH
    left = {s.reason for s in result.report.skipped}
    assert left == {"both factors of its products are computed, inside one operator"}
    onnx.checker.check_model(result.model)
    tokens = load_plays("test")[:24]
    reference = ort_run(fused, plays_feeds(fused, tokens), "none")[0]
    for level in ("basic", "all"):  # all at once, and in two calls
        whole = named(fused, ort_run(result.model, plays_feeds(fused, tokens), level))
        assert divergence(reference, whole["logits"]) < 0.06
        first = named(fused, ort_run(result.model, plays_feeds(fused, tokens[:1, :40]), level))
        more = {k: v for k, v in continued(fused, tokens[:1, :41], first).items() if k != "position_ids"}
        (logits, *_) = ort_run(result.model, more, level)
        np.testing.assert_allclose(logits[:, 0], whole["logits"][:1, 40], atol=0.5)


def test_transformer_of_onnxruntime_s_optimizer(tmp_path: Path) -> None:
    """Gelu, biases and sums in front of norms are fused; the vision transformer is as good as without."""
    source, calibration = ROOT / "models" / "digits_vit.onnx", ROOT / "models" / "digits_calib.npz"
    path = tmp_path / "fused.onnx"
    optimize_model(str(source), "vit", num_heads=4, hidden_size=48, opt_level=0).save_model_to_file(str(path))
    fused = onnx.load(path)
    assert types(fused)["SkipLayerNormalization"] > 3
    assert types(fused)["BiasGelu"] == 3
    result, plain = (quantize(m, calibration=calibration, bits=8, **FAST) for m in (fused, source))
    assert abs(result.report.sqnr_db - plain.report.sqnr_db) < 1
    assert {node.domain for node in result.model.graph.node} == {""}


LENGTH, WIDTH, HIDDEN, WORDS = 12, 32, 64, 40
LAYER = """
q{0} = MatMul(x{0}, wq{0}) k{0} = MatMul(x{0}, wk{0}) v{0} = MatMul(x{0}, wv{0})
a{0} = com.microsoft.MultiHeadAttention <num_heads = 4> (q{0}, k{0}, v{0}, bqkv{0}, lengths)
o{0} = MatMul(a{0}, wo{0})
n{0} = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (o{0}, x{0}, wg, wb, bo{0})
u{0} = MatMul(n{0}, wu{0}) g{0} = com.microsoft.BiasGelu(u{0}, bu{0}) d{0} = MatMul(g{0}, wd{0})
x{1} = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> (d{0}, n{0}, wg, wb, bd{0})
"""
EMBEDDED = (
    "x0, lengths = com.microsoft.EmbedLayerNormalization <epsilon = 0.00001> "
    "(input_ids, token_type_ids, wwords, wplaces, wkinds, wg, wb, attention_mask)"
)


def bert() -> onnx.ModelProto:
    """Two layers of BERT with random weights, as ONNX Runtime's optimizer fuses it."""
    sizes: dict[str, tuple[int, ...]] = {"wwords": (WORDS, WIDTH), "wplaces": (LENGTH, WIDTH), "wkinds": (2, WIDTH)}
    sizes |= {"wg": (WIDTH,), "wb": (WIDTH,), "wclass": (WIDTH, 10)}
    for k in range(2):
        sizes |= {f"w{part}{k}": (WIDTH, WIDTH) for part in "qkvo"}
        sizes |= {f"wu{k}": (WIDTH, HIDDEN), f"wd{k}": (HIDDEN, WIDTH), f"bu{k}": (HIDDEN,)}
        sizes |= {f"bqkv{k}": (3 * WIDTH,), f"bo{k}": (WIDTH,), f"bd{k}": (WIDTH,)}
    inputs = ", ".join(f"int32[batch, tokens] {name}" for name in ("input_ids", "token_type_ids", "attention_mask"))
    body = EMBEDDED + LAYER.format(0, 1) + LAYER.format(1, 2) + "y = MatMul(x2, wclass)"
    return Case(inputs, body, "float[batch, tokens, 10] y", sizes).model


@pytest.mark.parametrize(("options", "least"), [*zip(SETTINGS, (12, 24, 5), strict=True)], ids=["W4", "W8A8", "W4A4"])
def test_bert_as_if_it_had_never_been_fused(options: dict[str, Any], least: float) -> None:
    model, rng = bert(), np.random.default_rng(0)
    samples = {"input_ids": rng.integers(0, WORDS, (64, LENGTH), np.int32)}
    products = options.get("activation_bits") != "none"
    fused = quantize(model, calibration=samples, **options, **FAST)
    plain = quantize(run_passes([Unfuse()], model), calibration=samples, **options, **FAST)
    assert fused.report.supplied == ("token_type_ids", "attention_mask")
    assert fused.report.sqnr_db > least
    assert fused.report.sqnr_db == pytest.approx(plain.report.sqnr_db, abs=0.3)
    assert [x.name for x in fused.report.layers] == [x.name for x in plain.report.layers]
    assert len(fused.report.layers) == 14
    assert fused.report.probed == {}
    assert types(fused.model)["MultiHeadAttention"] == (0 if products else 2)
    assert {n.op_type for n in fused.model.graph.node if n.domain} <= {"MultiHeadAttention"}


def test_weights_alone_step_by_step() -> None:
    """`emit` finds the model as it was measured, with attention as one operator."""
    model, rng = bert(), np.random.default_rng(0)
    samples = {"input_ids": rng.integers(0, WORDS, (24, LENGTH), np.int32)}
    measurement = measure(model, samples, weights_only=True, effort="fast", threads=1)
    assert types(emit(model, allocate(measurement, bits=4)))["MultiHeadAttention"] == 2


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize(("options", "least"), [*zip(SETTINGS, (18, 27, 8), strict=True)], ids=["W4", "W8A8", "W4A4"])
def test_standard_attention(shared: int, options: dict[str, Any], least: float) -> None:
    nodes = (
        "n = RMSNormalization(x, wg) q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv) "
        f"a = Attention <q_num_heads = 4, kv_num_heads = {shared}, is_causal = 1> (q, k, v) "
        "o = MatMul(a, wo) r = Add(o, x) u = MatMul(r, wu) g = Gelu(u) y = MatMul(g, wd)"
    )
    sizes = {"wg": (32,), "wq": (32, 32), "wk": (32, 8 * shared), "wv": (32, 8 * shared), "wo": (32, 32)}
    model = Case("float[n, 8, 32] x", nodes, "float[n, 8, 12] y", {**sizes, "wu": (32, 64), "wd": (64, 12)}, opset=23)
    x = np.random.default_rng(0).standard_normal((64, 8, 32), np.float32)
    result = quantize(model.model, calibration={"x": x}, **options, **FAST)
    assert result.report.sqnr_db > least
    assert result.report.probed == {}
    kept = types(result.model)
    assert (kept["RMSNormalization"], kept["Gelu"]) == (1, 1)
    assert kept["Attention"] == (options.get("activation_bits") == "none")


def packed(weight: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round a weight [K, N] to 4 bits in blocks: codes and scales as MatMulNBits takes them."""
    parts = weight.T.reshape(weight.shape[1], -1, block)
    scales = np.abs(parts).max(axis=-1) / 7
    codes = (np.rint(parts / scales[..., None]) + 8).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def test_through_weights_that_are_quantized_already() -> None:
    """MatMulNBits stays as it is; the layer in front of it is priced by its gradient."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape, np.float32) / 6 for shape in ((32, 64), (64, 12)))
    codes, scales = packed(second, 32)
    stored = {"w": first, "B": codes, "scales": scales}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"], "first"),
        helper.make_node("Relu", ["z"], ["r"]),
        helper.make_node(
            "MatMulNBits",
            ["r", "B", "scales"],
            ["y"],
            "second",
            domain="com.microsoft",
            K=64,
            N=12,
            bits=4,
            block_size=32,
        ),
    ]
    ends = [helper.make_tensor_value_info(n, 1, ["n", size]) for n, size in (("x", 32), ("y", 12))]
    tensors = [numpy_helper.from_array(v, n) for n, v in stored.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    x = rng.standard_normal((64, 32), np.float32)
    result: Result = quantize(model, calibration={"x": x}, bits=4, **FAST)
    assert result.report.sqnr_db > 14
    assert result.report.probed == {}
    assert [layer.name for layer in result.report.layers] == ["first"]
    assert [(s.node, s.reason) for s in result.report.skipped] == [
        ("second", "it is already quantized, and stays as it is")
    ]
    emitted = {t.name: t for t in result.model.graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(emitted["B"]), codes)
    assert weights_as_inputs(result.model).graph.node[-1].op_type == "MatMulNBits"
