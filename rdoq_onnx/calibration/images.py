"""Decode images and crop them to the model's input size."""

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rdoq_onnx.calibration.samples import InputSpec

_MIN_PIXELS = 8  # per side: a smaller input is not an image

Array = NDArray[Any]


def channel_axis(spec: InputSpec) -> int | None:
    """The axis of an image's 1 or 3 channels; None if the input does not look like an image."""
    if len(spec.shape) != 4:
        return None
    spatial = {1: spec.shape[2:], 3: spec.shape[1:3]}
    for axis, sizes in spatial.items():
        if spec.shape[axis] in (1, 3) and all(size is None or size >= _MIN_PIXELS for size in sizes):
            return axis
    return None


def decode(data: bytes, channels: int, size: tuple[int | None, int | None]) -> NDArray[np.uint8]:
    """Decode `data` to an upright image, [H, W, channels], of height and width `size` (None keeps the image's own).

    An image of another size is scaled to cover `size` and center-cropped. Raises ValueError if `data` is not an image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = size[1] or image.width, size[0] or image.height
                image.draft("RGB", (2 * width, 2 * height))  # JPEG: decode no more pixels than needed
                upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
        except Exception as error:  # Pillow's decoders raise anything on arbitrary bytes
            raise ValueError(str(error) or type(error).__name__) from error
    width, height = size[1] or upright.width, size[0] or upright.height
    if upright.size != (width, height):
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(upright).reshape(height, width, channels)
