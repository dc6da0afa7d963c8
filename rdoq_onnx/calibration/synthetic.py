"""Random inputs in place of samples: dead leaves for images, normal floats, uniform integers.

Dead leaves are overlapping discs of all sizes (density ~ 1 / radius³). Unlike white noise, they have the edges, flat
regions and spectrum of natural images.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.images import channel_axis
from rdoq_onnx.calibration.samples import InputSpec

SIDE = 224  # pixels: size of a free image dimension
LENGTH = 16  # size of any other free dimension
DISCS = 256  # per image
CHROMA = 0.4  # standard deviation of a color channel around the disc's brightness, which has 1
TEXTURE = 0.15  # standard deviation of the texture on the discs

Array = NDArray[Any]


def draw(rng: np.random.Generator, spec: InputSpec, count: int | None, ranges: Mapping[str, int]) -> Array:
    """Draw random values for one input; a constant if `count` is None."""
    axis = None if count is None or spec.dtype.kind != "f" else channel_axis(spec)
    if count is not None and axis is not None:
        sizes = [SIDE if size is None else size for k, size in enumerate(spec.shape) if k not in (0, axis)]
        images = _dead_leaves(rng, count, spec.shape[axis] or 1, *sizes)
        return np.ascontiguousarray(np.moveaxis(images, 1, axis), spec.dtype)
    free = 1 if count is None else LENGTH  # 1 lets a constant run with a single sample
    shape = [free if size is None else size for size in spec.shape]
    if count is not None:
        shape[0] = count
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    if spec.dtype.kind == "b":
        return rng.random(shape) < 0.5
    high = min(max(ranges.get(spec.name, 2), 1), np.iinfo(spec.dtype).max)
    return rng.integers(0, high, shape, spec.dtype)


def _dead_leaves(rng: np.random.Generator, count: int, channels: int, height: int, width: int) -> Array:
    """Draw images of overlapping discs with radius density r^-3: the occlusions and scale invariance of photographs.

    Lee, Mumford, Huang: Occlusion models for natural images (IJCV 2001). A weak 1/f texture fills the discs.
    Each channel has zero mean and unit variance over the set. Shape [count, channels, height, width].
    """
    images = np.stack([_dead_leaf(rng, channels, height, width) for _ in range(count)])
    images -= images.mean((0, 2, 3), np.float64, keepdims=True)
    images /= images.std((0, 2, 3), np.float64, keepdims=True)
    return images


def _dead_leaf(rng: np.random.Generator, channels: int, height: int, width: int) -> Array:
    side = max(height, width)
    least, most = max(side / 32, 1) ** -2, (side / 2) ** -2
    radii = (least - rng.random(DISCS) * (least - most)) ** -0.5
    centers = rng.random((DISCS, 2)) * (height, width)
    top = np.zeros((height, width), np.intp)  # index of the topmost disc
    for number, ((y, x), radius) in enumerate(zip(centers, radii, strict=True)):
        rows = np.arange(max(int(y - radius), 0), min(int(y + radius) + 1, height))
        columns = np.arange(max(int(x - radius), 0), min(int(x + radius) + 1, width))
        inside = (rows[:, None] - y) ** 2 + (columns - x) ** 2 < radius**2
        np.copyto(top[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], number, where=inside)
    brightness = rng.standard_normal((1, DISCS))
    colors = brightness + CHROMA * rng.standard_normal((channels, DISCS))
    return (colors[:, top] + TEXTURE * _texture(rng, height, width)).astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Draw noise of amplitude 1/f with unit variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width))
    return np.asarray(noise / noise.std())
