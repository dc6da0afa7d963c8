"""Which variant of rounding each channel takes, as few samples show it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.quantizer import WeightCodes

_DRAWN = 0.6  # how far figures of variants are drawn together


def expected(found: NDArray[np.float64]) -> NDArray[np.float64]:
    """δ to expect of each variant of a channel, [variants, units, widths], from what few samples have shown.

    The least of several noisy figures promises too much. So each is drawn towards what the variants of the channel have
    in the mean, times what the variant is worth in the layer.
    """
    layer = found.sum(axis=1, keepdims=True)
    worth = layer / np.maximum(layer.mean(axis=0, keepdims=True), np.finfo(np.float64).tiny)
    drawn: NDArray[np.float64] = (1 - _DRAWN) * found + _DRAWN * found.mean(axis=0, keepdims=True) * worth
    return drawn


def picked(variants: Sequence[WeightCodes], best: NDArray[np.int64]) -> WeightCodes:
    """Each channel from its best variant; best [units]."""
    units = np.arange(len(best))
    integers, scales = (np.stack([getattr(v, name) for v in variants]) for name in ("integers", "scales"))
    return WeightCodes(integers[best, units], scales[best, units])
