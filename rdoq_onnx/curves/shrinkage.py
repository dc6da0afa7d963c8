"""What few samples show of a channel: which variant of rounding it takes, and what its curve is likely to be.

A figure measured on n draws is off by a share of √(2 / n) in the mean, as a sum of n squares is. It is drawn towards
what the whole layer shows as far as that noise goes, against how much channels truly differ.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import WeightCodes

_VARIANTS_DIFFER = 0.15  # relative to each other, from channel to channel of a layer
_CHANNELS_DIFFER = 1.0  # in what an error of their weights does to the output
_TINY = float(np.finfo(np.float64).tiny)

Float = NDArray[np.float64]


def expected(found: Float, draws: int) -> Float:
    """δ to expect of each variant of a channel, [variants, units, widths], from what `draws` draws have shown.

    The least of several noisy figures promises too much. So each is drawn towards what the variants of the channel have
    in the mean, times what the variant is worth in the layer.
    """
    layer = found.sum(axis=1, keepdims=True)
    worth = layer / np.maximum(layer.mean(axis=0, keepdims=True), _TINY)
    share = noise_share(draws, _VARIANTS_DIFFER)
    drawn: Float = (1 - share) * found + share * found.mean(axis=0, keepdims=True) * worth
    return drawn


def steadied(curves: Float, errors: Float, draws: int) -> Float:
    """Curves of a layer's channels [units, widths], each drawn towards what its weights' squared `errors` would do.

    A channel that has not mattered on the few samples seen would else be given no bits, and mean nothing on the next.
    """
    share = noise_share(draws, _CHANNELS_DIFFER)
    sensitivity = curves.sum(axis=0) / np.maximum(errors.sum(axis=0), _TINY)
    drawn: Float = (1 - share) * curves + share * sensitivity * errors
    return drawn


def squared_errors(codes: Sequence[WeightCodes], rows: NDArray[np.float32]) -> Float:
    """‖ΔW‖² of each channel [units, widths] for its `codes` at each width; rows [units, K]: the weights themselves."""
    return np.stack([np.square(c.values - rows, dtype=np.float64).sum(axis=1) for c in codes], axis=1)


def picked(variants: Sequence[WeightCodes], best: NDArray[np.int64]) -> WeightCodes:
    """Each channel from its best variant; best [units]."""
    units = np.arange(len(best))
    integers, scales = (np.stack([getattr(v, name) for v in variants]) for name in ("integers", "scales"))
    return WeightCodes(integers[best, units], scales[best, units])


def noise_share(draws: int, differ: float) -> float:
    """The share of the variance of figures that is noise, where they truly differ by `differ` of themselves."""
    return (2 / draws) / (2 / draws + differ**2)
