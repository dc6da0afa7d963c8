"""Images flipped, shifted and pasted into one another, so that few samples show more of what may come.

The targets are what the float network makes of the same images, so no label has to hold for them. Pasting a rectangle
of another image (CutMix, Yun et al., ICCV 2019) leaves what small windows see as it is in photographs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples

Array = NDArray[Any]

_SHIFT = 8  # images are shifted by up to 1 / _SHIFT of their size


def is_image(feeds: Mapping[str, Array]) -> bool:
    """Whether there is one input, of images: float [samples, 1 or 3 channels, height, width]."""
    (value, *rest) = feeds.values()
    return not rest and value.ndim == 4 and value.dtype.kind == "f" and value.shape[1] in (1, 3)


def augmented(feeds: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Flip half of the images of each input, shift all, and paste a rectangle of another one into half of them."""
    result = {}
    for name, images in feeds.items():
        moved = np.stack([_moved(image, rng) for image in images])
        pairs = zip(moved, np.roll(moved, 1, axis=0), strict=True)
        result[name] = np.stack([_pasted(image, other, rng) for image, other in pairs])
    return result


def copies(samples: Samples, count: int, seed: int) -> Samples:
    """Return `count` augmented copies of samples that are images, made whenever they are read."""
    parts = samples.by_shape()
    counts = [len(part) * count // len(samples) for part in parts]
    first, *others = (
        {name: _Copies(part, name, number, seed) for name in samples.arrays}
        for part, number in zip(parts, counts, strict=True)
    )
    return replace(samples, arrays=first, picked=None, others=tuple(others), labels=None)


@dataclass(frozen=True, eq=False)
class _Copies:
    """Copies of `images` of one shape, which are the input `name`: number k is of image k modulo their number."""

    images: Samples
    name: str
    number: int
    seed: int

    @cached_property
    def _sample(self) -> Array:
        return self.images.feeds([0])[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.number, *self._sample.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._sample.dtype

    def __getitem__(self, rows: Any, /) -> Array:
        copied = [self._copy(k) for k in np.arange(self.number)[rows].tolist()]
        return np.stack(copied) if copied else np.empty((0, *self.shape[1:]), self.dtype)

    def _copy(self, k: int) -> Array:
        rng, count = np.random.default_rng([self.seed, k]), len(self.images)
        both = self.images.feeds([k % count, (k + 1) % count])[self.name]
        image, other = (_moved(image, rng) for image in both)
        return _pasted(image, other, rng)


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


def _pasted(image: Array, other: Array, rng: np.random.Generator) -> Array:
    """Return an image [channels, height, width], at random with a rectangle of the `other` one."""
    if rng.random() >= 0.5:
        return image
    place = []
    for size in image.shape[1:]:
        first, last = np.sort(rng.integers(0, size + 1, 2))
        place.append(slice(int(first), int(last)))
    result = image.copy()
    result[(slice(None), *place)] = other[(slice(None), *place)]
    return result
