"""Random inputs where there are no samples: dead leaves for images, normal floats, uniform integers.

Dead leaves are discs of all sizes that cover one another (density ~ 1 / radius³). Their edges, flat parts and spectrum
are those of natural images, which white noise lacks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.images import channel_axis
from rdoq_onnx.calibration.samples import InputSpec

SIDE = 224  # pixels of a synthetic image where the model leaves them free
LENGTH = 16  # of any other free dimension of a synthetic input
DISCS = 256  # in a synthetic image
CHROMA = 0.4  # standard deviation of one colour channel around the disc's brightness, which has 1
TEXTURE = 0.15  # standard deviation of the texture over the discs

Array = NDArray[Any]


def draw(rng: np.random.Generator, spec: InputSpec, count: int | None, ranges: Mapping[str, int]) -> Array:
    """Random values for one input; `count` None makes a constant."""
    axis = None if count is None or spec.dtype.kind != "f" else channel_axis(spec)
    if count is not None and axis is not None:
        sizes = [SIDE if size is None else size for k, size in enumerate(spec.shape) if k not in (0, axis)]
        images = _dead_leaves(rng, count, spec.shape[axis] or 1, *sizes)
        return np.ascontiguousarray(np.moveaxis(images, 1, axis), spec.dtype)
    free = 1 if count is None else LENGTH  # with 1, a constant runs with one sample
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
    """Images of discs over discs, radius of density r^-3: the occlusions and scale invariance of photographs.

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
    centres = rng.random((DISCS, 2)) * (height, width)
    top = np.zeros((height, width), np.intp)  # number of the disc that lies on top
    for number, ((y, x), radius) in enumerate(zip(centres, radii, strict=True)):
        rows = np.arange(max(int(y - radius), 0), min(int(y + radius) + 1, height))
        columns = np.arange(max(int(x - radius), 0), min(int(x + radius) + 1, width))
        inside = (rows[:, None] - y) ** 2 + (columns - x) ** 2 < radius**2
        np.copyto(top[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], number, where=inside)
    brightness = rng.standard_normal((1, DISCS))
    colours = brightness + CHROMA * rng.standard_normal((channels, DISCS))
    return (colours[:, top] + TEXTURE * _texture(rng, height, width)).astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Noise of amplitude 1/f, zero mean and unit variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width))
    return np.asarray(noise / noise.std())
