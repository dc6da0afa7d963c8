"""Image normalization: (x · scale − mean) / std."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.images import Array

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pixels:
    """Image normalization: (x · scale - mean) / std, with a mean and std per channel or one for all.

    Defaults where None: scale 1/255; mean and std of ImageNet for three channels, 0 and 1 for one.
    """

    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def is_set(self) -> bool:
        return (self.scale, self.mean, self.std) != (None, None, None)

    def or_stored(self, arrays: Mapping[str, Array]) -> "Pixels | None":
        """These settings, completed by a `mean` and `std` stored with the images; None if neither specifies any."""
        if not self.is_set and not {"mean", "std"} <= arrays.keys():
            return None
        mean, std = (tuple(v.reshape(-1).tolist()) if v is not None else None for v in map(arrays.get, ("mean", "std")))
        return Pixels(self.scale, self.mean or mean, self.std or std)

    def normalize(self, images: Array) -> NDArray[np.float32]:
        """Normalize bytes [N, H, W, C] to float32.

        Raises ValueError unless mean and std each have one number per channel or a single one.
        """
        channels = images.shape[3]
        defaults = default_normalization(channels).values()
        pairs = zip((self.mean, self.std), defaults, strict=True)
        mean, std = (np.array(default if own is None else own, np.float32) for own, default in pairs)
        for name, values in (("mean", mean), ("std", std)):
            if values.size not in (1, channels):
                found = f"the images have {channels} channels, {name} (--image-{name}) has {values.size} numbers"
                raise ValueError(f"{found}; give one number per channel, or one for all")
        divisor = np.float32(255 if self.scale is None else 1 / self.scale)
        with np.errstate(divide="ignore", invalid="ignore"):
            normalized: NDArray[np.float32] = (images.astype(np.float32) / divisor - mean) / std
        return normalized


DEFAULT_PIXELS = Pixels()


def default_normalization(channels: int) -> dict[str, Array]:
    """The default `mean` and `std`."""
    mean, std = IMAGENET if channels == len(IMAGENET[0]) else ((0.0,), (1.0,))
    return {"mean": np.array(mean, np.float32), "std": np.array(std, np.float32)}
