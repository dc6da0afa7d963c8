"""Which outputs are rows of logits, and how far they diverge."""

import numpy as np
import onnx
import pytest
from onnx import parser

from rdoq_onnx.observation.distortion import logit_axes
from rdoq_onnx.observation.logits import divergences, spreads
from rdoq_onnx.observation.parts import find_parts

ZEROS = ", ".join("0" * 36)
TABLE = f"<float[9, 4] table = {{{ZEROS}}}, float[4, 9] head, float[4, 5] w>"


def axes(graph: str) -> dict[str, int]:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g {graph}'
    return logit_axes(find_parts(parser.parse_model(text)))


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ("(float[N, 4] x) => (float[N, 5] y) <float[4, 5] w> { y = MatMul (x, w) }", {"y": -1}),
        ("(float[N, 4] x) => (float[N, 5] y) <float[4, 5] w> { a = MatMul (x, w) y = Softmax (a) }", {"a": -1}),
        (
            "(float[N, 4] x) => (float[N, 3, 5] y) <float[4, 5] w, int64[3] s> "
            "{ a = MatMul (x, w) b = LogSoftmax <axis = 1> (a) y = Reshape (b, s) }",
            {},
        ),
        ("(float[N, 4, 7] x) => (float[N, 4, 7] y) { y = LogSoftmax <axis = 1> (x) }", {"y": 1}),
        (f"(int64[N, T] i) => (float[N, T, 9] y) {TABLE} {{ e = Gather (table, i) y = MatMul (e, head) }}", {"y": -1}),
        (f"(int64[N, T] i) => (float[N, T, 5] y) {TABLE} {{ e = Gather (table, i) y = MatMul (e, w) }}", {}),
        (
            f"(int64[N, T] i) => (float[N, T, 5] logits) {TABLE} {{ e = Gather (table, i) logits = MatMul (e, w) }}",
            {"logits": -1},
        ),
        ("(float[N, 4] x) => (float[N, 1] y) <float[4, 1] w> { y = MatMul (x, w) }", {}),
        ("(float[N, 4] x) => (float[N, 5] y) <float[4, 5] w> { a = MatMul (x, w) y = Sigmoid (a) }", {}),
        ("(float[N, 4] x) => (float[N, 5] y) <float[4, 5] w> { a = MatMul (x, w) y = Tanh (a) }", {}),
        ("(float[N, 4] x) => (float[N, 5] y, float[N, 4] z) <float[4, 5] w> { y = MatMul (x, w) z = Relu (x) }", {}),
        (
            "(float[N, 4] x, float[N, 4] state) => (float[N, 5] logits, float[N, 4] state_out) <float[4, 5] w> "
            "{ state_out = Add (x, state) logits = MatMul (state_out, w) }",
            {"logits": -1},
        ),
    ],
)
def test_an_output_is_rows_of_logits(graph: str, expected: dict[str, int]) -> None:
    assert axes(graph) == expected


def test_divergence_of_two_distributions_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    by_hand = float((p * np.log(p / q)).sum())
    shifted = np.log(q)[None] + 3.0  # a constant added to a row changes nothing
    assert divergences(shifted, np.log(p)[None], -1) == pytest.approx([by_hand])
    assert divergences(np.log(p)[:, None], np.log(p)[:, None], 0) == pytest.approx([0.0])


def test_a_class_without_probability_counts_nothing() -> None:
    masked = np.array([[0.0, 1.0, -np.inf]])
    assert divergences(masked, masked, -1) == pytest.approx([0.0])
    assert np.isfinite(spreads(masked, -1)).all()


def test_the_spread_is_the_divergence_of_no_logits_to_second_order() -> None:
    z = 1e-2 * np.random.default_rng(0).standard_normal((6, 8))
    np.testing.assert_allclose(spreads(z, -1), divergences(np.zeros_like(z), z, -1), rtol=2e-2)


def test_parts_without_logits_have_no_axes() -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }'
    )
    assert isinstance(model, onnx.ModelProto)
    assert logit_axes(()) == {}
