"""Images: which inputs look like one, and decoding to the model's input size."""

import io

import numpy as np
import pytest
from PIL import Image

from rdoq_onnx.calibration.images import channel_axis, decode
from tests.calibration.test_load import spec

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)

AXES = {
    (None, 3, 16, 16): 1,
    (None, 1, None, None): 1,
    (None, 16, 16, 3): 3,
    (4, 3, 16, 3): None,  # neither axis has image dimensions beside it
    (None, 3, 4, 4): None,  # too small
    (None, 2, 16, 16): None,
    (None, 3, 16): None,
}


@pytest.mark.parametrize("shape", AXES)
def test_channel_axis_of_an_input(shape):
    assert channel_axis(spec("x", *shape)) == AXES[shape]


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def test_an_image_of_the_right_size_is_kept():
    for size in ((12, 20), (None, None), (12, None)):
        np.testing.assert_array_equal(decode(png(PIXELS), 3, size), PIXELS)


def test_channels_are_those_of_the_model():
    gray = decode(png(PIXELS), 1, (None, None))
    assert gray.shape == (12, 20, 1)
    np.testing.assert_allclose(gray[..., 0], PIXELS @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(decode(png(PIXELS[..., 0]), 3, (None, None)), PIXELS[..., :1].repeat(3, -1))


def test_another_size_is_scaled_to_cover_and_center_cropped():
    wide = np.zeros((12, 36, 3), np.uint8)
    wide[:, 9:27] = 200  # the middle third and a margin; the rest is cropped
    np.testing.assert_array_equal(decode(png(wide), 3, (6, 6)), np.full((6, 6, 3), 200))


@pytest.mark.parametrize("data", [b"", b"no image", png(PIXELS)[:60]])
def test_undecodable_bytes_are_a_value_error(data):
    with pytest.raises(ValueError, match=r"."):
        decode(data, 3, (None, None))
