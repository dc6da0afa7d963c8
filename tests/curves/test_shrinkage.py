"""Which variant of rounding each channel takes."""

import numpy as np

from rdoq_onnx.curves.shrinkage import expected, picked, squared_errors, steadied
from rdoq_onnx.model.codes import WeightCodes


def test_a_variant_better_in_the_layer_wins_where_channels_say_little():
    found = np.array([[1.0, 1.0, 1.0, 1.0], [2.1, 1.9, 2.0, 0.9]])[:, :, None]
    assert expected(found, 32).argmin(axis=0)[:, 0].tolist() == [0, 0, 0, 0]


def test_a_channel_takes_the_variant_that_is_far_better_for_it():
    found = np.array([[1.0, 1.0, 1.0, 1.0], [1.2, 1.2, 1.2, 0.1]])[:, :, None]
    assert expected(found, 200).argmin(axis=0)[:, 0].tolist() == [0, 0, 0, 1]


def test_the_least_of_several_is_not_taken_at_its_word():
    """Pure noise around 1: what is expected of the best must be nearer to 1 than the least that was found."""
    found = 1 + 0.2 * np.random.default_rng(0).standard_normal((3, 500, 2))
    assert found.min(axis=0).mean() < 0.84
    assert expected(found, 32).min(axis=0).mean() > 0.92


def test_many_draws_are_taken_at_their_word():
    found = np.random.default_rng(0).random((3, 5, 2))
    np.testing.assert_allclose(expected(found, 10**9), found, rtol=1e-5)
    np.testing.assert_allclose(steadied(found[0], np.ones((5, 2)), 10**9), found[0], rtol=1e-5)


def test_a_channel_that_few_samples_left_idle_still_has_a_falling_curve():
    errors = np.array([[4.0, 1.0, 0.25]]).repeat(6, axis=0)
    curves = 3 * errors
    curves[2] = 0
    few, many = steadied(curves, errors, 4), steadied(curves, errors, 400)
    assert (np.diff(few[2]) < 0).all()
    assert few[2, 0] > 50 * many[2, 0] > 0
    np.testing.assert_allclose(few.sum(axis=0), curves.sum(axis=0))  # the layer's sum stays


def test_squared_errors():
    rows = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    code = WeightCodes(np.array([[1, 1], [2, 2]], np.int8), np.array([1, 1.5], np.float32))
    np.testing.assert_allclose(squared_errors([code, code], rows), [[1, 1], [1, 1]])


def test_one_variant_stays_as_it_is():
    found = np.random.default_rng(0).random((1, 5, 3))
    np.testing.assert_allclose(expected(found, 32), found)


def test_widths_without_distortion_pick_something():
    assert np.isfinite(expected(np.zeros((3, 4, 2)), 32)).all()


def test_picks_integers_and_scales_together():
    variants = [WeightCodes(np.full((3, 2), k, np.int8), np.full(3, k, np.float32)) for k in range(2)]
    chosen = picked(variants, np.array([1, 0, 1]))
    assert chosen.integers.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert chosen.scales.tolist() == [1, 0, 1]
