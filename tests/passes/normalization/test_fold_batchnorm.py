"""Folding keeps the outputs, and happens only where it is exact."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization.fold_batchnorm import FoldBatchNorm
from rdoq_onnx.passes.normalization.normalize import Normalize
from tests.conftest import OrtRun, deviation, feeds_for, random_feeds, real_models

NORM = ("gamma", "beta", "mean", "var")
BN = "BatchNormalization"


def build(body: str, sizes: dict[str, tuple[int, ...]], ends: str, dtype: type = np.float32) -> ModelProto:
    """A model from its signature, its nodes, and the shapes of its random weights (`var` positive)."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {ends} {{ {body} }}')
    rng = np.random.default_rng(0)
    for name, shape in sizes.items():
        value: NDArray[Any] = rng.uniform(0.5, 2, shape) if "var" in name else rng.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(value.astype(dtype), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def norm(channels: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(NORM, (channels,))


def ops(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


IMAGE = "(float[N, 4, 8, 8] x) => (float[N, M, H, W] y)"
ROWS = "(float[N, 6] x) => (float[N, 5] y)"
BEHIND = f"y = {BN}(t, gamma, beta, mean, var)"
BEFORE = f"t = {BN}<epsilon = 0.1>(x, gamma, beta, mean, var)"
CONV = {"w": (6, 4, 3, 3)}
GEMM = {"w": (6, 5)}


@pytest.mark.parametrize(
    ("ends", "body", "sizes", "expected"),
    [
        (IMAGE, f"t = Conv<pads = [1, 1, 1, 1]>(x, w) {BEHIND}", CONV | norm(6), ["Conv"]),
        (IMAGE, f"t = Conv(x, w, b) {BEHIND}", CONV | {"b": (6,)} | norm(6), ["Conv"]),
        (IMAGE, f"t = Conv<group = 2>(x, w) {BEHIND}", {"w": (6, 2, 3, 3)} | norm(6), ["Conv"]),
        (IMAGE, f"t = ConvTranspose(x, w) {BEHIND}", {"w": (4, 6, 3, 3)} | norm(6), ["ConvTranspose"]),
        (
            IMAGE,
            f"t = ConvTranspose<group = 2, strides = [2, 2]>(x, w, b) {BEHIND}",
            {"w": (4, 3, 3, 3), "b": (6,)} | norm(6),
            ["ConvTranspose"],
        ),
        (ROWS, f"t = Gemm(x, w) {BEHIND}", GEMM | norm(5), ["Gemm"]),
        (
            ROWS,
            f"t = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b) {BEHIND}",
            {"w": (5, 6), "b": (1, 5)} | norm(5),
            ["Gemm"],
        ),
        (ROWS, f"t = Gemm(x, w, b) {BEHIND}", GEMM | {"b": (1,)} | norm(5), ["Gemm"]),
        (ROWS, f"t = MatMul(x, w) {BEHIND}", GEMM | norm(5), ["MatMul", "Add"]),
        (IMAGE, f"{BEFORE} y = Conv(t, w)", CONV | norm(4), ["Conv"]),
        (IMAGE, f"{BEFORE} y = Conv<group = 2>(t, w, b)", {"w": (6, 2, 3, 3), "b": (6,)} | norm(4), ["Conv"]),
        (ROWS, f"{BEFORE} y = Gemm<alpha = 0.5>(t, w, b)", GEMM | {"b": (5,)} | norm(6), ["Gemm"]),
        (ROWS, f"{BEFORE} y = Gemm<transB = 1>(t, w)", {"w": (5, 6)} | norm(6), ["Gemm"]),
        (ROWS, f"{BEFORE} y = MatMul(t, w)", GEMM | norm(6), ["MatMul", "Add"]),
        (
            IMAGE,
            "t = Conv(x, w) u = Mul(s, t) v = Add(u, b) a = Sub(c, v) e = Div(a, var) y = Sub(e, k)",
            CONV | {"s": (1, 6, 1, 1), "b": (6, 1, 1), "c": (1, 6, 1, 1), "var": (6, 1, 1), "k": ()},
            ["Conv"],
        ),
        (ROWS, "t = MatMul(x, w) y = Add(t, b)", GEMM | {"b": (5,)}, ["MatMul", "Add"]),
    ],
)
def test_folds(ends: str, body: str, sizes: dict[str, tuple[int, ...]], expected: list[str], ort_run: OrtRun) -> None:
    model = build(body, sizes, ends)
    result = run_passes([FoldBatchNorm()], model)
    assert ops(result) == expected
    assert list(result.graph.output) == list(model.graph.output)
    assert not {t.name for t in result.graph.initializer} & set(NORM)
    feeds = random_feeds(model)
    assert deviation(ort_run(result, feeds, "none"), ort_run(model, feeds, "none")) < 1e-6


TWO = "(float[N, 4, 8, 8] x) => (float[N, M, H, W] y, float[N, M1, H1, W1] z)"


@pytest.mark.parametrize(
    ("ends", "body", "sizes"),
    [
        # the layer's output has another consumer, or is a graph output
        (TWO, f"t = Conv(x, w) {BEHIND} z = Relu(t)", CONV | norm(6)),
        (TWO.replace(" z)", " t)"), f"t = Conv(x, w) {BEHIND}", CONV | norm(6)),
        # the offset would have to be padded, too
        (IMAGE, f"{BEFORE} y = Conv<pads = [1, 1, 1, 1]>(t, w)", CONV | norm(4)),
        (IMAGE, f'{BEFORE} y = Conv<auto_pad = "SAME_UPPER">(t, w)', CONV | norm(4)),
        (IMAGE, f"{BEFORE} y = ConvTranspose(t, w)", {"w": (4, 6, 3, 3)} | norm(4)),
        # the statistics are those of the batch
        (IMAGE, f"t = Conv(x, w) y, m1, v1 = {BN}<training_mode = 1>(t, gamma, beta, mean, var)", CONV | norm(6)),
        # axis 1 is not the layer's channel
        (
            "(float[N, 5, 6] x) => (float[N, 5, 5] y)",
            f"t = MatMul(x, w) {BEHIND}",
            GEMM | norm(5),
        ),
        # not one value per channel, or not constant
        (IMAGE, "t = Conv(x, w) y = Mul(t, s)", CONV | {"s": (6,)}),
        (IMAGE, "t = Conv(x, w) y = Mul(t, s)", {"w": (1, 4, 3, 3), "s": (1, 6, 1, 1)}),
        (IMAGE, "t = Conv(x, w) y = Mul(t, t)", CONV),
        (IMAGE, "t = Conv(x, w) y = Div(s, t)", CONV | {"s": (1, 6, 1, 1)}),
        ("(float[N, 4, 8, 8] x, float[6] b) => (float[N, 6, 6, 6] y)", f"t = Conv(x, w, b) {BEHIND}", CONV | norm(6)),
        (ROWS.replace("N,", "5,"), f"t = Gemm(x, w, b) {BEHIND}", GEMM | {"b": (5, 5)} | norm(5)),
    ],
)
def test_leaves(ends: str, body: str, sizes: dict[str, tuple[int, ...]]) -> None:
    model = build(body, sizes, ends)
    assert run_passes([FoldBatchNorm()], model) == model


def test_shift_free_norm_before_a_padded_conv(ort_run: OrtRun) -> None:
    model = build(f"{BEFORE} y = Conv<pads = [1, 1, 1, 1]>(t, w)", CONV | norm(4), IMAGE)
    for weight in model.graph.initializer:
        if weight.name in ("beta", "mean"):
            weight.CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), weight.name))
    result = run_passes([FoldBatchNorm()], model)
    assert ops(result) == ["Conv"]
    feeds = random_feeds(model)
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 1e-6


def test_shared_weights_are_not_edited_in_place(ort_run: OrtRun) -> None:
    body = f"t = Conv(x, w, b) {BEHIND} z = Conv(x, w, b)"
    model = build(body, CONV | {"b": (6,)} | norm(6), TWO)
    result = run_passes([FoldBatchNorm()], model)
    assert ops(result) == ["Conv", "Conv"]
    assert {t.name for t in result.graph.initializer} == {"w", "w_1", "b", "b_1"}
    feeds = random_feeds(model)
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 1e-6


def test_a_norm_read_within_a_subgraph_is_not_folded_into_it(ort_run: OrtRun) -> None:
    ends = "(float[N, 4, 8, 8] x, bool c) => (float[N, M, H, W] y)"
    body = f"""t = Conv(x, w)
        y = If (c) <then_branch = f () => (float[N, M, H, W] p) {{ p = {BN}(t, gamma, beta, mean, var) }},
                    else_branch = h () => (float[N, M, H, W] q) {{ q = Neg(x) }}>"""
    model = build(body, {"w": (4, 4, 1, 1)} | norm(4), ends)
    assert run_passes([FoldBatchNorm()], model) == model


def test_half_precision(ort_run: OrtRun) -> None:
    ends = IMAGE.replace("float[", "float16[")
    model = build(f"t = Conv(x, w) {BEHIND}", CONV | norm(6), ends, np.float16)
    result = run_passes([FoldBatchNorm()], model)
    assert ops(result) == ["Conv"]
    assert {t.data_type for t in result.graph.initializer} == {onnx.TensorProto.FLOAT16}
    feeds = random_feeds(model)
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 2e-3


def test_values_beyond_the_weight_s_range_are_not_folded() -> None:
    ends = IMAGE.replace("float[", "float16[")
    model = build("t = Conv(x, w) y = Mul(t, s)", CONV | {"s": (1, 6, 1, 1)}, ends, np.float16)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full((1, 6, 1, 1), 6e4, np.float16), "s"))
    assert run_passes([FoldBatchNorm()], model) == model


@pytest.mark.parametrize("path", real_models())
def test_real_models_compute_the_same(path: Path, ort_run: OrtRun) -> None:
    model = onnx.load(path)
    result = run_passes([Normalize(), FoldBatchNorm()], model)
    left = Counter(ops(result))
    assert left[BN] == 0
    feeds = feeds_for(path, model)
    assert deviation(ort_run(result, feeds), ort_run(model, feeds)) < 1e-5


def test_the_caller_s_model_is_not_altered() -> None:
    model = build(f"t = Conv(x, w) {BEHIND}", CONV | norm(6), IMAGE)
    twin = build(f"t = Conv(x, w) {BEHIND}", CONV | norm(6), IMAGE)
    run_passes([FoldBatchNorm()], model)
    assert model == twin
