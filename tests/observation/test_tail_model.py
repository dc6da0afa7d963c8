"""Extreme values beyond few samples, against distributions of known tails."""

import numpy as np
import pytest

from rdoq_onnx.candidates.activations import affine
from rdoq_onnx.observation.tail_model import ExtremeValues, Tail, with_extreme_values


def test_excess_of_an_exponential_tail():
    found = Tail.of(np.random.default_rng(0).exponential(3.0, 20_000))
    assert found.excess == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("values", [np.zeros(50), np.full(50, 6.0), -np.ones(50), np.array([2.0])])
def test_no_tail_where_the_end_is_a_bound(values):
    """As on the lower side of a Relu, or behind a saturated Clip."""
    assert Tail.of(values).excess == 0
    assert Tail.of(values).beyond(max(values.max(), 0.0) + 1) == 0


@pytest.mark.parametrize("end", [4.0, 5.5, 6.0, 7.0])
def test_clipping_error_of_extreme_values(end):
    """An exponential tail behind the greatest value, integrated numerically."""
    tail = Tail(6.0, 0.7)
    a = np.linspace(6.0, 40.0, 2_000_000)
    density = np.exp(-(a - 6.0) / 0.7) / 0.7
    clipped = np.square(np.maximum(a - end, 0.0)) * density
    assert tail.beyond(end) == pytest.approx(clipped.sum() * (a[1] - a[0]), rel=1e-4)


def test_clipping_error_of_held_out_values_is_as_predicted():
    """Normal values: 200 observed, with enough trials for the extreme ones to average out."""
    rng = np.random.default_rng(0)
    predicted = clipped = 0.0
    for _ in range(400):
        seen, others = rng.standard_normal(200), rng.standard_normal(2000)
        extremes = ExtremeValues.of(seen)
        quantizer = affine(seen.min(), seen.max(), 8)
        low, high = quantizer.range
        predicted += extremes.beyond(quantizer)
        clipped += float(np.square(others - np.clip(others, low, high)).mean())
    assert 0.5 < predicted / clipped < 2


def test_curves_prefer_a_range_wider_than_the_observed_one():
    extremes = ExtremeValues.of(np.random.default_rng(0).standard_normal(200))
    low, high = extremes.reach
    table = {8: tuple(affine(low * share, high * share, 8) for share in (1.0, 0.8, 0.6, 0.4))}
    seen = {8: np.array([q.scale**2 / 12 for q in table[8]])}
    (found,) = with_extreme_values({"x": table}, [seen], {"x": extremes})
    assert seen[8].argmin() == 3
    assert found[8].argmin() < 3
    assert table[8][found[8].argmin()].range[1] > extremes.high.end
    assert with_extreme_values({"x": table}, [seen], {}) == (seen,)
