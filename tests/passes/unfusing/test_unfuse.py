"""Unfused models compute the same; what no rule covers stays."""

import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization.widen_floats import WidenFloats
from rdoq_onnx.passes.unfusing.unfuse import CLOSED, OPENED, PRODUCTS, Unfuse
from tests import fused
from tests.conftest import OrtRun, deviation
from tests.fused import Case


def kinds(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in model.graph.node)


@pytest.mark.parametrize("name", fused.OPENED)
def test_same_numbers_from_standard_operators(name: str, ort_run: OrtRun) -> None:
    case = fused.OPENED[name]
    result = run_passes([Unfuse()], case.model)
    assert not {*OPENED, *PRODUCTS} & {*kinds(result)}
    assert {domain for domain, _ in kinds(result)} == {""}
    onnx.checker.check_model(result, full_check=True)
    for level in ("none", "all"):
        assert deviation(ort_run(result, case.feeds, level), ort_run(case.model, case.feeds, "none")) < 1e-5


@pytest.mark.parametrize("name", fused.CLOSED)
def test_what_stays_is_opened_to_differentiate(name: str, ort_run: OrtRun) -> None:
    case = fused.CLOSED[name]
    assert run_passes([Unfuse()], case.model) == case.model
    result = run_passes([Unfuse(closed=True)], case.model)
    assert not {*OPENED, *PRODUCTS, *CLOSED} & {*kinds(result)}
    assert deviation(ort_run(result, case.feeds, "none"), ort_run(case.model, case.feeds, "none")) < 1e-5


def test_attention_stays_one_operator_if_nothing_goes_inside() -> None:
    for name, case in fused.ATTENTION.items():
        model, stays = case.model, not name.startswith("packed")
        result = run_passes([Unfuse(products=False)], model)
        assert bool({*PRODUCTS} & {*kinds(result)}) == stays, name
        assert (result == model) == stays, name


def test_every_form_among_onnx_s_own_tests(ort_run: OrtRun) -> None:
    """What is written out computes what onnx expects; most forms are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        cases = [case for case in collect_testcases(None) if "_expanded" not in case.name]
    standard = {name for domain, name in (*OPENED, *PRODUCTS, *CLOSED) if not domain}
    counts: Counter[bool] = Counter()
    for case in cases:
        if not standard & {node.op_type for node in case.model.graph.node}:
            continue
        (inputs, expected), *_ = case.data_sets
        if any(np.asarray(x).dtype.kind == "V" for x in inputs) or "bf16" in case.name:
            continue  # NumPy lacks bfloat16
        result = run_passes([WidenFloats(), Unfuse(closed=True)], case.model)
        opened = not standard & {op for _, op in kinds(result)}
        counts[opened] += 1
        if opened:
            feeds = {i.name: np.asarray(x) for i, x in zip(case.model.graph.input, inputs, strict=True)}
            for got, value in zip(ort_run(result, feeds), expected, strict=True):
                np.testing.assert_allclose(got, np.asarray(value), rtol=2e-3, atol=2e-3, err_msg=case.name)
    assert counts[True] > 2 * counts[False]


def test_every_rule_has_a_case() -> None:
    cases = {**fused.OPENED, **fused.CLOSED}.values()
    assert {*OPENED, *PRODUCTS, *CLOSED} <= {kind for case in cases for kind in kinds(case.model)}


def test_layers_in_a_row_whose_ranks_follow_from_each_other(ort_run: OrtRun) -> None:
    block = (
        "q{0} = MatMul(x{0}, wq) k{0} = MatMul(x{0}, wk) v{0} = MatMul(x{0}, wv) "
        "a{0} = com.microsoft.MultiHeadAttention <num_heads = 2> (q{0}, k{0}, v{0}) "
        "x{1} = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (a{0}, x{0}, wg, wb) "
    )
    nodes = "".join(block.format(k, k + 1) for k in range(3))
    weights = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wg": (8,), "wb": (8,)}
    case = Case("float[N, 5, 8] x0", nodes, "float[N, 5, 8] x3", weights)
    result = run_passes([Unfuse()], case.model)
    assert {domain for domain, _ in kinds(result)} == {""}
    assert deviation(ort_run(result, case.feeds), ort_run(case.model, case.feeds)) < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        Case(
            "float[N, 5, 3, 3, 4] x",
            "y = com.microsoft.MultiHeadAttention <num_heads = 3> (x)",
            "float[N, 5, 12] y",
        ),
        Case(
            f"{fused.X}, int32[M] mask",
            f"{fused.QKV} y = {fused.MULTI}> (q, k, v, , mask)",
            "float[N, 5, 12] y",
            fused.PROJECTIONS,
            {"mask": np.array([5, 5, 0, 5, 10, 0, 5, 10])},
        ),
        Case(
            f"{fused.X}, int64 last",
            f"{fused.QKV} y, s = com.microsoft.SkipLayerNormalization(x, x, wg)",
            "float[N, 5, 8] y, float s",
            {**fused.PROJECTIONS, "wg": (8,)},
        ),
        Case(
            "float[N, 5, 8] x, int64[1] offset",
            "y = com.microsoft.RotaryEmbedding(x, offset, wcos, wsin)",
            "float[N, 5, 8] y",
            fused.ANGLES,
        ),
    ],
    ids=["packed operands", "bounds in place of a mask", "statistics of a norm", "one offset for all"],
)
def test_other_forms_stay(case: Case) -> None:
    """Nothing of a refused rule is left behind."""
    assert Unfuse(closed=True)(case.model) == case.model


def test_bodies_stay(ort_run: OrtRun) -> None:
    case = Case(
        "float[N, 5, 8] x, bool c",
        "y = If (c) <then_branch = t () => (float[N, 5, 8] p) { p = com.microsoft.Gelu(x) },"
        " else_branch = e () => (float[N, 5, 8] p) { p = Identity(x) }> z = com.microsoft.Gelu(y)",
        "float[N, 5, 8] z",
        integers={"c": True},
    )
    result = run_passes([Unfuse()], case.model)
    assert kinds(result)[("com.microsoft", "Gelu")] == 0
    assert deviation(ort_run(result, case.feeds), ort_run(case.model, case.feeds)) < 1e-5


def test_models_without_such_operators_are_returned_as_they_are() -> None:
    model = Case(fused.X, "y = MatMul(x, w)", "float[N, 5, 6] y", {"w": (8, 6)}).model
    assert Unfuse(closed=True)(model) is model
