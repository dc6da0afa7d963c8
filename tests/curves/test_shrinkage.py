"""Shrinkage of channel curves and the choice of rounding variants."""

import numpy as np

from rdoq_onnx.curves.shrinkage import falling_curves, picked, shrunk_curves, shrunk_variants, squared_errors
from rdoq_onnx.model.codes import WeightCodes


def test_the_layers_best_variant_wins_if_channels_hardly_differ():
    found = np.array([[1.0, 1.0, 1.0, 1.0], [2.1, 1.9, 2.0, 0.9]])[:, :, None]
    assert shrunk_variants(found, 32).argmin(axis=0)[:, 0].tolist() == [0, 0, 0, 0]


def test_a_channel_takes_a_variant_that_is_far_better_for_it():
    found = np.array([[1.0, 1.0, 1.0, 1.0], [1.2, 1.2, 1.2, 0.1]])[:, :, None]
    assert shrunk_variants(found, 200).argmin(axis=0)[:, 0].tolist() == [0, 0, 0, 1]


def test_the_least_of_several_noisy_values_is_raised():
    """Pure noise around 1: after shrinkage the least value must be closer to 1."""
    found = 1 + 0.2 * np.random.default_rng(0).standard_normal((3, 500, 2))
    assert found.min(axis=0).mean() < 0.84
    assert shrunk_variants(found, 32).min(axis=0).mean() > 0.92


def test_many_draws_are_not_shrunk():
    found = np.random.default_rng(0).random((3, 5, 2))
    np.testing.assert_allclose(shrunk_variants(found, 10**9), found, rtol=1e-5)
    np.testing.assert_allclose(shrunk_curves(found[0], np.ones((5, 2)), 10**9), found[0], rtol=1e-5)


def test_a_channel_without_effect_on_few_samples_still_has_a_falling_curve():
    errors = np.array([[4.0, 1.0, 0.25]]).repeat(6, axis=0)
    curves = 3 * errors
    curves[2] = 0
    few, many = shrunk_curves(curves, errors, 4), shrunk_curves(curves, errors, 400)
    assert (np.diff(few[2]) < 0).all()
    assert few[2, 0] > 50 * many[2, 0] > 0
    np.testing.assert_allclose(few.sum(axis=0), curves.sum(axis=0))  # the layer's sum stays


def test_squared_errors():
    rows = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    code = WeightCodes(np.array([[1, 1], [2, 2]], np.int8), np.array([1, 1.5], np.float32))
    np.testing.assert_allclose(squared_errors([code, code], rows), [[1, 1], [1, 1]])


def test_one_variant_stays_as_it_is():
    found = np.random.default_rng(0).random((1, 5, 3))
    np.testing.assert_allclose(shrunk_variants(found, 32), found)


def test_zero_distortion_stays_finite():
    assert np.isfinite(shrunk_variants(np.zeros((3, 4, 2)), 32)).all()


def test_picks_integers_and_scales_together():
    variants = [WeightCodes(np.full((3, 2), k, np.int8), np.full(3, k, np.float32)) for k in range(2)]
    chosen = picked(variants, np.array([1, 0, 1]))
    assert chosen.integers.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert chosen.scales.tolist() == [1, 0, 1]


def test_curves_fall_with_the_width():
    curves = np.array([[4.0, 1.0, 0.25], [1.0, 0.2, 0.25], [0.1, 0.3, 0.25]])
    found = falling_curves(curves, np.array([16.0, 4.0, 1.0]) * np.ones((3, 1)))
    np.testing.assert_array_equal(found[0], curves[0])
    assert (np.diff(found, axis=1) < 0).all()
    np.testing.assert_allclose(found, [[4.0, 1.0, 0.25], [1.0, 0.25, 0.25], [0.3, 0.3, 0.25]], rtol=1e-8)


def test_a_grid_that_fits_and_channels_without_effect_keep_their_curves():
    curves = np.array([[1.0, 0.0, 0.1], [1e-20, 2e-20, 3e-20], [8.0, 4.0, 2.0]])
    errors = np.array([[4.0, 0.0, 0.3], [4.0, 1.0, 0.3], [4.0, 1.0, 0.3]])
    np.testing.assert_array_equal(falling_curves(curves, errors), curves)
