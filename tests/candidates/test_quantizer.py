"""Scales and rounding: integers that fit their width, errors that fall with it, ONNX's arithmetic to the last bit."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdoq_onnx.candidates.quantizer import block_window, quantize_blocks, quantize_rows
from rdoq_onnx.model.codes import stored

EPSILON = np.finfo(np.float32).eps


def channels(seed, tail):
    """Return rows of different sizes and tails, some one-sided, one of zeros. tail: exponent of the tail's weight."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((7, 40))
    rows = np.sign(rows) * np.abs(rows) ** tail * 10.0 ** rng.uniform(-6, 4, (7, 1))
    rows[1], rows[2], rows[3] = np.abs(rows[1]), -np.abs(rows[2]), 0
    return rows.astype(np.float32)


def errors(rows, codes):
    return np.square(rows.astype(np.float64) - codes.values).sum(axis=1)


SEEDS = st.integers(0, 2**32 - 1)
TAILS = st.floats(0.3, 4)
WIDTHS = st.integers(0, 8)


@given(SEEDS, TAILS, WIDTHS, st.sampled_from([64, 127]))
def test_integers_fit_the_width_and_the_limit(seed, tail, bits, limit):
    codes = quantize_rows(channels(seed, tail), bits, limit)
    assert codes.integers.dtype == np.int8
    assert codes.scales.dtype == np.float32
    q = codes.integers.astype(int)
    low, high = np.minimum(q.min(axis=1), 0), np.maximum(q.max(axis=1), 0)
    # Zero is one of the 2^b levels: kernels pad with it.
    assert (high - low).max() <= 2**bits - 1
    assert np.abs(q).max() <= limit
    assert np.isfinite(codes.scales).all()
    assert (codes.scales > 0).all()


def test_the_whole_window_is_used():
    rows = np.random.default_rng(0).standard_normal((3, 20000)).astype(np.float32)
    for bits in range(1, 8):
        assert (np.ptp(quantize_rows(rows, bits, 64).integers, axis=1) == 2**bits - 1).all()
    # 8 bits beside integer activations stay within ±64.
    assert (np.abs(quantize_rows(rows, 8, 64).integers).max(axis=1) == 64).all()


def test_the_odd_level_goes_to_the_heavier_tail():
    row = np.array([[-1.0, -0.5, 0, 0.5, 1, 1.5, 2]], np.float32)
    codes = quantize_rows(row, 2, 64)
    assert codes.integers.max() == 2
    assert codes.integers.min() == -1
    np.testing.assert_array_equal(quantize_rows(-row, 2, 64).integers, -codes.integers)


@given(SEEDS, TAILS, st.sampled_from([64, 127]))
def test_zero_bits_are_zeros(seed, tail, limit):
    rows = channels(seed, tail)
    codes = quantize_rows(rows, 0, limit)
    assert not codes.integers.any()
    assert not codes.values.any()
    # The scales have no meaning, but kernels divide by them.
    assert (codes.scales > 0).all()
    assert np.isfinite(1 / codes.scales).all()


@given(SEEDS, TAILS)
@example(277, 3.75)  # four bits are 15 % worse than three
def test_error_falls_as_the_width_grows(seed, tail):
    rows = channels(seed, tail)
    found = [errors(rows, quantize_rows(rows, bits, 127)) for bits in range(9)]
    power = np.square(rows.astype(np.float64)).sum(axis=1)
    # The windows of two widths are not nested, and the scale search is a grid: allow for both.
    for narrow, wide in itertools.pairwise(found):
        assert (wide <= narrow * 1.25 + 1e-9 * power).all()
        assert (wide > narrow * 1.05 + 1e-9 * power).sum() <= 1
    np.testing.assert_allclose(found[0], power)
    assert (found[8] <= 1e-3 * power).all()


@pytest.mark.parametrize("weights", [9, 40, 300])
def test_searched_scale_beats_the_whole_range(weights):
    rows = np.random.default_rng(2).standard_normal((300, weights))
    gains = []
    for bits in range(2, 8):
        reach = 2 ** (bits - 1) - 1
        scales = np.abs(rows).max(axis=1, keepdims=True) / reach
        plain = np.square(rows - np.rint(rows / scales) * scales).sum(axis=1)
        gains.append(np.mean(errors(rows, quantize_rows(rows, bits, 64)) / plain))
    assert max(gains) < 1
    assert gains[0] < 0.4


def test_importance_of_weights():
    rng = np.random.default_rng(3)
    rows, importance = rng.standard_normal((50, 30)), rng.lognormal(0, 2, (50, 30))

    def weighted(codes):
        return (importance * np.square(rows - codes.values)).sum(axis=1).mean()

    for bits in (2, 3, 4):
        heeded, ignored = (weighted(quantize_rows(rows, bits, 64, importance=i)) for i in (importance, None))
        assert heeded < 0.95 * ignored


def test_searched_scale_clips_outliers():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1, 2000)).astype(np.float32)
    rows[0, 0] = 12
    codes = quantize_rows(rows, 4, 64)
    plain = np.square(rows - np.clip(np.rint(rows / (12 / 7)), -8, 7) * (12 / 7)).sum()
    assert errors(rows, codes)[0] < 0.5 * plain
    # The optimum of a uniform quantizer with 16 levels for a normal variable is 1.154 % of its power.
    assert errors(rows[:, 1:], quantize_rows(rows[:, 1:], 4, 64))[0] / 1999 == pytest.approx(0.01154, rel=0.1)


def test_least_scale_is_respected():
    rows = channels(0, 1)
    floor = np.abs(rows).max(axis=1) / 3
    for bits in range(9):
        assert (quantize_rows(rows, bits, 127, floor).scales >= floor * (1 - 2.0**-11)).all()


def test_values_that_are_representable_are_kept():
    rng = np.random.default_rng(1)
    for bits in range(2, 8):
        integers = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 60))
        integers[:, 0] = -(2 ** (bits - 1))
        scales = stored(10.0 ** rng.uniform(-3, 2, (5, 1)))
        rows = (integers * scales).astype(np.float32)
        codes = quantize_rows(rows, bits, 64)
        np.testing.assert_allclose(codes.values, rows, rtol=1e-5)


def test_scales_are_exact_in_half_precision():
    scales = stored(10.0 ** np.random.default_rng(1).uniform(-4, 4, 1000))
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float64))
    tiny = stored(np.array([3e-20, 7e12]))
    np.testing.assert_allclose(tiny, [3e-20, 7e12], rtol=2.0**-11)
    for bits in range(9):
        found = quantize_rows(channels(0, 1), bits, 127).scales.astype(np.float64)
        np.testing.assert_array_equal(found, stored(found))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_blocks_have_scales_of_their_own(bits):
    rng = np.random.default_rng(bits)
    rows = rng.standard_normal((6, 48)) * np.repeat(10.0 ** rng.uniform(-2, 1, (6, 3)), 16, axis=1)
    importance = rng.uniform(0.1, 2, rows.shape)
    codes, whole = quantize_blocks(rows, bits, 127, 16, importance), quantize_rows(rows, bits, 127, None, importance)
    assert codes.scales.shape == (6, 3)
    low, high = block_window(bits, 127)
    assert (codes.integers.min(), codes.integers.max()) >= (low, 0)
    assert codes.integers.max() <= high
    errors = [(importance * np.square(c.values - rows)).sum(axis=1) for c in (codes, whole)]
    assert (errors[0] < errors[1]).all()
    # Each block alone finds the same.
    block = quantize_blocks(rows[:, 16:32], bits, 127, 16, importance[:, 16:32])
    np.testing.assert_array_equal(block.values, codes.values[:, 16:32])


def test_a_block_of_zeros_and_one_whose_heavier_tail_is_positive():
    rows = np.array([[0.0, 0, 0, 0, 1, 2, -1, 0, -1, -2, 1, 0]])
    codes = quantize_blocks(rows, 2, 127, 4)
    np.testing.assert_array_equal(codes.values, rows)
    assert (np.sign(codes.scales[0, 1:]) == [-1, 1]).all()
    assert codes.integers.min() == -2
    assert not quantize_blocks(rows, 0, 127, 4).integers.any()
