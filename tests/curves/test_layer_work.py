"""Rounding of some channels of a layer against rounding of all, and the figures that come with the codes."""

import numpy as np
import pytest

from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.curves import layer_work
from rdoq_onnx.curves.forms import kept_form
from rdoq_onnx.curves.layer_work import LayerWork, Rounded
from rdoq_onnx.model.codes import WeightCodes
from tests.cases import large_bench
from tests.curves.test_forms import network


@pytest.fixture(params=["conv", "groups", "depthwise", "transposed", "matmul"])
def case(request):
    """Return the work of a layer, and its moments."""
    with large_bench(*network(request.param)) as large:
        large.collect({})
        (layer,), statistics = large.bench.network.layers, large.statistics
        rows = large.bench.network.rows(layer)
        yield LayerWork(layer, rows, kept_form(statistics, layer), 127, None), statistics.moments(layer)


def assert_equal(one, other):
    for name in ("curves", "errors"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5)
    np.testing.assert_array_equal(one.codes.integers, other.codes.integers)
    np.testing.assert_allclose(one.codes.scales, other.codes.scales)


def test_parts_are_the_whole(case, monkeypatch):
    work, moments = case
    whole = work.nearest(work.all, moments.covariance, (3, 5))
    monkeypatch.setattr(layer_work, "_TOGETHER", 1)
    parts = work.parts(work.all)
    single = work.layer.linear.group == 1
    assert len(parts) == (len(work.rows) if single else 1)
    assert np.concatenate(parts).tolist() == work.all.tolist()
    rounded = [work.nearest(part, moments.covariance, (3, 5)) for part in parts]
    for k, expected in enumerate(whole):
        assert_equal(Rounded.joined([each[k] for each in rounded]), expected)
    compensator = Compensator.of(moments.covariance, 0.1)
    scales = whole[0].codes.scales
    several = [work.compensated(part, 3, scales[part], compensator) for part in parts]
    assert_equal(Rounded.joined(several), work.compensated(work.all, 3, scales, compensator))


def test_figures_are_those_of_the_codes(case):
    work, moments = case
    (nearest,) = work.nearest(work.all, moments.covariance, (3,))
    fitted = work.compensated(work.all, 3, nearest.codes.scales, Compensator.of(moments.covariance, 0.1))
    for rounded in (nearest, fitted):
        change = rounded.codes.values - work.rows
        np.testing.assert_allclose(rounded.errors, np.square(change).sum(axis=1), rtol=1e-4)
        np.testing.assert_allclose(rounded.curves, work.form(change, work.all), rtol=1e-3)
        assert np.abs(rounded.codes.integers.astype(int)).max() <= 4
    variance = moments.covariance
    blocks = [work.form.blocks.cut(r.codes.values - work.rows) for r in (nearest, fitted)]
    before, after = (np.einsum("gok,gkl,gol->", b, variance, b) for b in blocks)
    assert after < 1.2 * before


def rounded(seed):
    rng = np.random.default_rng(seed)
    codes = WeightCodes(rng.integers(-9, 9, (4, 3)).astype(np.int8), rng.random(4).astype(np.float32))
    return Rounded(codes, rng.random(4), rng.random(4))


def test_each_unit_from_its_best_variant():
    variants, best = [rounded(k) for k in range(3)], np.array([2, 0, 1, 2])
    found = Rounded.best(variants, best)
    for unit, k in enumerate(best):
        expected = variants[k].taken(np.array([unit]))
        assert_equal(found.taken(np.array([unit])), expected)
        assert expected.codes.integers.shape == (1, 3)
