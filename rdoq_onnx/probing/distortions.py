"""Measured distortions of all candidates: δ by layer, variant, channel and width, and by activation and width."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Distortions:
    """Measured curves.

    weights: δ of each rounding variant for each layer, [variants, units, widths]. activations: δ of each quantizer for
    each activation and width. missing: tensors whose curve could not be measured, with the reason; their entries are
    NaN.
    """

    weights: tuple[NDArray[np.float64], ...]
    activations: tuple[Mapping[int, NDArray[np.float64]], ...]
    missing: Mapping[str, str]
