"""Activation quantizers: covered and clipped ranges, exact zero, no clipping from few samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.candidates.activations import (
    affine,
    affine_candidates,
    hard_swish_candidates,
    refined,
    saturates_for_hard_swish,
)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("span", [(-1.0, 2.0), (0.0, 2.0), (-3.0, 1.0)])
def test_quantizers_around_a_zero_point_of_zero(bits, span):
    found = affine(*span, bits, symmetric=True)
    assert (found.signed, found.zero_point) == (True, 0)
    whole, positive = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, min(2**bits - 1, 127))
    assert (found.low, found.high) == (positive if span[0] == 0 else whole)
    reached = found.range
    if bits > 1:
        assert reached[0] <= span[0] + 1e-6
        assert reached[1] >= span[1] - 1e-6
    for other in (*affine_candidates(*span, bits, symmetric=True), *refined(found, *span)):
        assert (other.signed, other.low, other.high) == (True, found.low, found.high)


RANGES = st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32)).map(sorted)


@given(RANGES, st.integers(1, 8))
def test_candidates_of_an_activation(span, bits):
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    found = affine_candidates(*span, bits)
    assert len(found) == len(set(found)) >= 1
    for candidate in found:
        assert (candidate.low, candidate.high, candidate.bits) == (0, 2**bits - 1, bits)
        assert 0 <= candidate.zero_point <= candidate.high
        assert candidate.scale > 0
        assert candidate.scale == np.float32(candidate.scale)
        np.testing.assert_array_equal(candidate(np.zeros(3, np.float32)), 0)
        if low == 0:
            assert candidate.zero_point == 0
    spans = [a.range[1] - a.range[0] for a in found]
    assert spans == sorted(spans, reverse=True)
    # A constant zero is quantized like the range 0..1.
    assert spans[0] <= (high - low or 1.0) * (1 + 1e-5) + 1e-25


@given(RANGES)
def test_covering_clips_nothing_but_half_a_step(span):
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    quantizer = affine(*span, 8)
    assert quantizer.bits == 8
    least, greatest = quantizer.range
    half = 0.5 * quantizer.scale * (1 + 1e-4)
    assert least - low <= half
    assert high - greatest <= half


def test_non_negative_tensors_use_all_levels_for_positive_values():
    for bits in range(1, 9):
        affine = affine_candidates(0.1, 5.0, bits)[0]
        assert affine.range[0] == 0
        got = affine(np.linspace(0, 5, 5000, dtype=np.float32))
        assert len(np.unique(got)) == 2**bits


def test_fewer_bits_try_tighter_clips():
    tightest = [affine_candidates(0.0, 1.0, bits)[-1].range[1] for bits in range(1, 9)]
    assert (np.diff(tightest) >= -1e-6).all()
    assert tightest[0] < tightest[-1]


def test_a_range_from_few_samples_is_not_clipped():
    for bits in range(1, 9):
        found = affine_candidates(-1.0, 3.0, bits, uncertain=True)
        assert (found == [affine(-1.0, 3.0, bits)]) == (bits > 5)


def test_refined_ranges_stay_within_the_tensor():
    quantizer = affine(-1.0, 2.0, 4)
    found = refined(quantizer, -1.1, 2.1)
    assert found[0] == quantizer
    assert len(found) > 4
    for other in found:
        assert other.bits == 4
        assert other.range[0] >= -1.1 - other.scale
        assert other.range[1] <= 2.1 + other.scale
    positive = refined(affine(0.0, 6.0, 4), 0.0, 6.0)
    assert all(other.range[0] == 0 and other.range[1] <= 6 + 1e-5 for other in positive)


@given(st.floats(-5, 90), st.booleans())
def test_quantizers_in_front_of_a_hard_swish_begin_at_its_zero(high, uncertain):
    found = hard_swish_candidates(high, uncertain)
    assert len(found) == len(set(found)) >= 1
    assert found[0].range[1] >= high - 1e-4
    for candidate in (*found, *refined(found[0], -20.0, max(high, 0.0))):
        assert saturates_for_hard_swish(candidate.scale, candidate.zero_point)
        assert candidate.range[0] == pytest.approx(-3, rel=1e-6)
        assert (candidate.low, candidate.high) == (0, 255)
    if uncertain:
        assert len(found) == 1


@pytest.mark.parametrize("high", [200.0, 1e4])
def test_a_long_range_keeps_its_own_scale(high):
    (found,) = hard_swish_candidates(high, uncertain=True)
    assert not saturates_for_hard_swish(found.scale, found.zero_point)
    assert found.range[1] == pytest.approx(high, rel=0.01)
    assert found.range[0] <= 0
