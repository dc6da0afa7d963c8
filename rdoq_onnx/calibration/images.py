"""Images as samples: decoded and cropped to what the model wants, and from bytes to its numbers."""

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rdoq_onnx.calibration.samples import InputSpec

_MIN_PIXELS = 8  # a side: a smaller input is no image

Array = NDArray[Any]


def channel_axis(spec: InputSpec) -> int | None:
    """Where an image has its 1 or 3 channels, None if the input looks like no image."""
    if len(spec.shape) != 4:
        return None
    spatial = {1: spec.shape[2:], 3: spec.shape[1:3]}
    for axis, sizes in spatial.items():
        if spec.shape[axis] in (1, 3) and all(size is None or size >= _MIN_PIXELS for size in sizes):
            return axis
    return None


def decode(data: bytes, channels: int, size: tuple[int | None, int | None]) -> NDArray[np.uint8]:
    """The image in `data`, upright, [H, W, channels], of the height and width `size`, its own where that is None.

    One of another size is scaled until it just covers `size`, and cropped around its centre. Raises ValueError on what
    is no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(data)) as image:
                wanted = size[1] or image.width, size[0] or image.height
                image.draft("RGB", (2 * wanted[0], 2 * wanted[1]))  # JPEG: decodes no more pixels than it takes
                upright = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
        except Exception as error:  # Pillow's decoders meet any bytes whatever
            raise ValueError(str(error) or type(error).__name__) from error
    wanted = size[1] or upright.width, size[0] or upright.height
    if upright.size != wanted:
        upright = ImageOps.fit(upright, wanted, Image.Resampling.BILINEAR)
    return np.asarray(upright).reshape(wanted[1], wanted[0], channels)
