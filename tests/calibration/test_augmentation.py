"""Augmented images consist of rows and columns of the given ones."""

import numpy as np
import pytest

from rdoq_onnx.calibration.augmentation import augmented, copies, is_image
from rdoq_onnx.calibration.samples import Samples


@pytest.mark.parametrize(
    ("shapes", "image"),
    [
        ({"x": (2, 3, 8, 8)}, True),
        ({"x": (2, 1, 8, 6)}, True),
        ({"x": (2, 4, 8, 8)}, False),
        ({"x": (2, 64)}, False),
        ({"x": (2, 3, 8, 8), "y": (2, 3)}, False),
    ],
)
def test_images_are_recognized_by_their_shape(shapes, image):
    assert is_image({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}) is image


def test_integers_are_no_images():
    assert not is_image({"x": np.zeros((2, 3, 8, 8), np.uint8)})


def test_pixels_keep_their_values_and_their_channels():
    images = np.random.default_rng(0).random((6, 3, 16, 12)).astype(np.float32)
    moved = augmented({"x": images}, np.random.default_rng(1))["x"]
    assert moved.shape == images.shape
    assert moved.dtype == images.dtype
    assert (moved != images).any()
    for k in range(3):
        assert np.isin(moved[:, k], images[:, k]).all()


def test_the_generator_decides():
    images = np.random.default_rng(0).random((4, 1, 8, 8)).astype(np.float32)
    first, again, other = (augmented({"x": images}, np.random.default_rng(seed))["x"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_given_images_stay():
    images = np.random.default_rng(0).random((4, 1, 8, 8)).astype(np.float32)
    before = images.copy()
    augmented({"x": images}, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before)


def test_copies_are_of_the_given_images_and_the_same_whenever_they_are_read():
    images = np.random.default_rng(0).random((5, 3, 8, 8)).astype(np.float32)
    samples = Samples("test", {"x": images}, labels=np.arange(5)).take([0, 2, 4])
    made = copies(samples, 7, seed=1)
    assert len(made) == 7
    assert made.labels is None
    found = made.feeds(slice(None))["x"]
    assert found.dtype == np.float32
    assert np.isin(found, images[[0, 2, 4]]).all()
    assert not np.isin(found, images[[1, 3]]).any()
    np.testing.assert_array_equal(made.feeds([4, 1])["x"], found[[4, 1]])
    assert (copies(samples, 7, seed=2).feeds(slice(None))["x"] != found).any()


@pytest.mark.parametrize(("count", "sizes"), [(12, [8, 4]), (2, [1])])
def test_images_of_each_shape_have_copies_of_that_shape(count, sizes):
    shapes = (4, 1, 8, 8), (2, 1, 6, 4)
    first, second = ({"x": np.ones(shape, np.float32)} for shape in shapes)
    made = copies(Samples("test", first, others=(second,)), count, seed=0)
    assert [len(part) for part in made.by_shape()] == sizes
    for part, shape in zip(made.by_shape(), shapes, strict=False):
        assert part.feeds(slice(None))["x"].shape[1:] == shape[1:]
