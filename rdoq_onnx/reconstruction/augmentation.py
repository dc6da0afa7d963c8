"""Images flipped, shifted and pasted into one another, so that few samples show more of what may come.

The targets are what the float network makes of the same images, so no label has to hold for them. Pasting a rectangle
of another image (CutMix, Yun et al., ICCV 2019) leaves what small windows see as it is in photographs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SHIFT = 8  # images are shifted by up to 1 / _SHIFT of their size


def is_image(feeds: Mapping[str, Array]) -> bool:
    """Whether there is one input, of images: float [samples, 1 or 3 channels, height, width]."""
    (value, *rest) = feeds.values()
    return not rest and value.ndim == 4 and value.dtype.kind == "f" and value.shape[1] in (1, 3)


def augmented(feeds: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Flip half of the images of each input, shift all, and paste a rectangle of another one into half of them."""
    return {name: _pasted(np.stack([_moved(image, rng) for image in value]), rng) for name, value in feeds.items()}


def _moved(image: Array, rng: np.random.Generator) -> Array:
    """Return one image [channels, height, width] flipped at random and shifted; what moves in repeats the edge."""
    if rng.random() < 0.5:
        image = image[:, :, ::-1]
    for axis in (1, 2):
        size = image.shape[axis]
        reach = -(-size // _SHIFT)
        shift = int(rng.integers(-reach, reach + 1))
        image = image.take(np.clip(np.arange(size) + shift, 0, size - 1), axis)
    return image


def _pasted(images: Array, rng: np.random.Generator) -> Array:
    """Return images [samples, ...] with a rectangle of the next one in half of them."""
    others = np.roll(images, 1, axis=0)
    result = images.copy()
    for image, other in zip(result, others, strict=True):
        if rng.random() < 0.5:
            place = []
            for size in image.shape[1:]:
                first, last = np.sort(rng.integers(0, size + 1, 2))
                place.append(slice(int(first), int(last)))
            image[(slice(None), *place)] = other[(slice(None), *place)]
    return result
