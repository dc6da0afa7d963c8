"""How pixels become numbers: (x · scale − mean) / std."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.images import Array

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Pixels:
    """How bytes of images become numbers: (x · scale - mean) / std, one mean and std for each channel or one for all.

    None: 1/255; ImageNet's means and deviations for three channels, 0 and 1 for one.
    """

    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def given(self) -> bool:
        return (self.scale, self.mean, self.std) != (None, None, None)

    def over(self, beside: Mapping[str, Array]) -> "Pixels | None":
        """These settings, or else `mean` and `std` that lie beside the images; None if nothing is said."""
        if not self.given and not {"mean", "std"} <= beside.keys():
            return None
        mean, std = (tuple(v.reshape(-1).tolist()) if v is not None else None for v in map(beside.get, ("mean", "std")))
        return Pixels(self.scale, self.mean or mean, self.std or std)

    def normal(self, images: Array) -> NDArray[np.float32]:
        """Float32 of bytes [N, H, W, C]. Raises ValueError unless there is a mean and a std for each channel."""
        channels = images.shape[3]
        usual = usual_normalisation(channels).values()
        pairs = zip((self.mean, self.std), usual, strict=True)
        mean, std = (np.array(u if given is None else given, np.float32) for given, u in pairs)
        for name, values in (("mean", mean), ("std", std)):
            if values.size not in (1, channels):
                found = f"the images have {channels} channels, {name} (--image-{name}) has {values.size} numbers"
                raise ValueError(f"{found}; give one number a channel, or one for all")
        divisor = np.float32(255 if self.scale is None else 1 / self.scale)
        with np.errstate(divide="ignore", invalid="ignore"):
            normal: NDArray[np.float32] = (images.astype(np.float32) / divisor - mean) / std
        return normal


AS_USUAL = Pixels()


def usual_normalisation(channels: int) -> dict[str, Array]:
    """`mean` and `std` where nothing is said."""
    mean, std = IMAGENET if channels == len(IMAGENET[0]) else ((0.0,), (1.0,))
    return {"mean": np.array(mean, np.float32), "std": np.array(std, np.float32)}
