"""Image normalization: settings, arrays stored with the images, defaults."""

import numpy as np
import pytest

from rdoq_onnx.calibration.pixels import DEFAULT_PIXELS, IMAGENET, Pixels, default_normalization

BYTES = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)


def test_three_channels_default_to_imagenet():
    expected = (BYTES / 255 - IMAGENET[0]) / IMAGENET[1]
    found = DEFAULT_PIXELS.normalize(BYTES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gray_goes_from_0_to_1():
    gray = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_array_equal(DEFAULT_PIXELS.normalize(gray).ravel(), [0, 1])
    assert [v.tolist() for v in default_normalization(1).values()] == [[0.0], [1.0]]


def test_settings_override_defaults():
    given = Pixels(scale=2.0, mean=(1, 2, 3), std=(4,))
    np.testing.assert_allclose(given.normalize(BYTES), (BYTES * 2.0 - [1, 2, 3]) / 4, rtol=1e-5)


def test_settings_override_stored_arrays():
    beside = {"mean": np.array([0.5]), "std": np.array([[0.25]])}
    assert DEFAULT_PIXELS.or_stored(beside) == Pixels(None, (0.5,), (0.25,))
    assert Pixels(mean=(0.0,)).or_stored(beside) == Pixels(None, (0.0,), (0.25,))
    assert Pixels(scale=1.0).or_stored({}) == Pixels(1.0)
    assert DEFAULT_PIXELS.or_stored({"mean": beside["mean"]}) is None


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_wrong_number_of_values_is_refused(name):
    with pytest.raises(ValueError, match=rf"3 channels, {name} \(--image-{name}\) has 2 numbers; give one"):
        Pixels(**{name: (1.0, 2.0)}).normalize(BYTES)
