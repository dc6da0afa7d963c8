"""Bounds of what few samples prove, against scipy and against many draws."""

import math

import numpy as np
import pytest
from scipy import stats

from rdoq_onnx.observation.confidence import share_bound, share_needed, sqnr_bound, sqnr_needed, student


@pytest.mark.parametrize(("hits", "samples"), [(38, 38), (37, 38), (5, 9), (1, 400), (399, 400), (0, 7), (980, 1000)])
def test_a_share_is_bounded_as_by_clopper_and_pearson(hits, samples):
    expected = stats.beta.ppf(0.05, hits, samples - hits + 1) if hits else 0.0
    assert share_bound(hits, samples) == pytest.approx(expected, abs=1e-9)


def test_how_many_samples_prove_a_share():
    assert share_needed(0.99) == 299
    for share in (0.5, 0.9, 0.97, 0.999):
        needed = share_needed(share)
        assert share_bound(needed, needed) >= share > share_bound(needed - 1, needed - 1)
    assert (share_needed(1.0), share_needed(0.0)) == (None, 1)


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 6, 10, 37, 1000])
def test_students_quantile(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=1e-3)


@pytest.mark.parametrize("count", [8, 40])
def test_the_bound_of_an_sqnr_holds_in_about_95_of_100_draws(count):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        signal, noise = rng.gamma(20, 1, count), rng.gamma(4, 0.01, count)
        held += sqnr_bound(signal, noise) <= 10 * math.log10(20 / 0.04)
    assert 0.92 <= held / 2000 <= 0.985


def test_few_samples_prove_little():
    signal, noise = np.array([1.0, 2.0]), np.array([0.01, 0.05])
    assert sqnr_bound(signal[:1], noise[:1]) == -math.inf
    assert sqnr_bound(signal, noise) < 10 * math.log10(3 / 0.06) - 5
    assert sqnr_bound(signal, np.zeros(2)) == math.inf
    assert sqnr_needed(signal, noise, 30) is None
    assert 2 < sqnr_needed(signal, noise, 16.9) < 10**5
    needed = sqnr_needed(signal, noise, 16)
    many = [np.tile(v, needed // 2 + 1) for v in (signal, noise)]
    assert sqnr_bound(*many) > 15.5
