"""Weights on a grid are found as such, and come out of the whole program without loss where the width holds them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.model.grid import Grid

SEEDS = st.integers(0, 2**32 - 1)


def levels(rng, shape, low, high):
    """Integers low..high; the greatest magnitude occurs in each row."""
    q = rng.integers(low, high + 1, shape)
    q[:, 0] = high if high >= -low else low
    return q


def scales(rng, units):
    return np.exp(rng.uniform(-9, 3, units)).astype(np.float32)


@given(SEEDS, st.integers(1, 127), st.integers(2, 90))
def test_the_grid_of_dequantized_integers(seed, reach, inputs):
    rng = np.random.default_rng(seed)
    q = levels(rng, (5, inputs), -reach, reach)
    q[:, 1] = 1  # so that no coarser grid holds the row
    s = scales(rng, 5)
    found = Grid.of(q.astype(np.float32) * s[:, None])
    np.testing.assert_array_equal(found.codes.integers, q)
    np.testing.assert_array_equal(found.codes.values, q.astype(np.float32) * s[:, None])
    assert found.whole


@given(SEEDS)
def test_weights_without_a_grid(seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((6, 40)).astype(np.float32)
    rows[1] = 0
    rows[2, 1:] = 0
    rows[3, 0] = np.inf
    rows[4] = 0.5 * rng.integers(-3, 4, 40)
    rows[4, :3] = 1.5, 0.5, 1e-5
    found = Grid.of(rows)
    assert not found.codes.scales.any()
    assert not found.codes.integers.any()
    assert not found.whole


def test_weights_stored_in_half_precision():
    rng = np.random.default_rng(0)
    q = levels(rng, (4, 64), -63, 63)
    rows = (q * scales(rng, 4)[:, None]).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(Grid.of(rows).codes.integers, q)


def test_widths_that_hold_a_grid():
    ranges = [(-2, 1), (-1, 2), (-8, 7), (-7, 8), (-9, 6), (-64, 63), (-127, 127)]
    rows = np.array([(low, high, 1) for low, high in ranges], np.float32)
    found = Grid.of(rows)
    fits = np.stack([found.fits(bits, 127) for bits in range(9)])
    narrowest = fits.argmax(axis=0).tolist()
    assert narrowest == [2, 2, 4, 4, 5, 7, 8]
    assert found.fits(8, 64).tolist() == [True] * 6 + [False]


MLP = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 24] x) => (float[N, 5] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"""

OPTIONS = [{}, {"effort": "fast"}, {"effort": "best"}, {"measure": "probe"}, "widths"]


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -1, 1), (4, -7, 8), (7, -63, 63), (8, -127, 127)])
@pytest.mark.parametrize(
    "options", [{}, {"effort": "fast"}, {"effort": "best"}, {"measure": "probe"}, "widths"], ids=str
)
def test_a_grid_is_kept_without_loss(ort_run, bits, low, high, options):
    rng = np.random.default_rng(bits)
    model = parser.parse_model(MLP)
    for name, shape in {"w": (32, 24), "v": (5, 32)}.items():
        rows = levels(rng, shape, low, high).astype(np.float32) * scales(rng, shape[0])[:, None]
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(rows.T), name))
    samples = {"x": rng.standard_normal((48, 24)).astype(np.float32)}
    options = {"widths": (bits,)} if options == "widths" else options
    result = rdoq_onnx.quantize(model, samples, weight_bits=bits, weights_only=True, **options)
    assert result.report.sqnr_db > 120
    (expected,), (found,) = ort_run(model, samples), ort_run(result.model, samples)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
