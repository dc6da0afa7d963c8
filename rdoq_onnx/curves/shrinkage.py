"""Shrinkage of noisy curves: rounding variants and curves of channels, shrunk towards those of their layer.

A mean of n squares has a relative error of √(2 / n). It is shrunk towards the layer's by s = (2 / n) / (2 / n + d²),
where d is the true relative spread between channels (`noise_share`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import WeightCodes

_VARIANT_SPREAD = 0.15  # d of variants relative to each other, between the channels of a layer
_CHANNEL_SPREAD = 1.0  # d of the output's sensitivity to weight errors, between the channels of a layer
_ON_GRID = 0.25  # squared rounding error, relative to that at the next width, at which weights lie on a narrow grid
_JUST_ABOVE = 1 + 1e-9
_NO_EFFECT = 1e-6  # share of the layer's mean δ below which a channel has no effect
_TINY = float(np.finfo(np.float64).tiny)

Float = NDArray[np.float64]


def shrunk_variants(distortion: Float, draws: int) -> Float:
    """Shrink δ of each channel's variants, [variants, units, widths], each the mean of `draws` draws.

    The least of several noisy values is too optimistic. So each is shrunk towards the mean over the channel's variants,
    times the variant's δ relative to that mean in the whole layer.
    """
    layer = distortion.sum(axis=1, keepdims=True)
    relative = layer / np.maximum(layer.mean(axis=0, keepdims=True), _TINY)
    share = noise_share(draws, _VARIANT_SPREAD)
    shrunk: Float = (1 - share) * distortion + share * distortion.mean(axis=0, keepdims=True) * relative
    return shrunk


def shrunk_curves(curves: Float, errors: Float, draws: int) -> Float:
    """Shrink the curves of a layer's channels [units, widths] towards the layer's sensitivity times squared `errors`.

    Otherwise a channel that had no effect on few samples would get no bits, and fail on other samples.
    """
    share = noise_share(draws, _CHANNEL_SPREAD)
    sensitivity = curves.sum(axis=0) / np.maximum(errors.sum(axis=0), _TINY)
    shrunk: Float = (1 - share) * curves + share * sensitivity * errors
    return shrunk


def falling_curves(curves: Float, errors: Float) -> Float:
    """Raise δ of narrow widths [units, widths] to just above that of wider ones, so that it falls with the width.

    The least of several noisy values is too optimistic: of widths that the budget allows, the one would be taken that
    looked best on few samples, however narrow. Weights that lie on the grid of a narrow width, whose squared `errors`
    there are smaller, keep their curves, and so do channels without any effect, which may become constants.
    """
    effective = curves > _NO_EFFECT * curves.mean(axis=0)
    result = curves.copy()
    for k in range(curves.shape[1] - 2, -1, -1):
        noisy = effective[:, k + 1] & (errors[:, k] > _ON_GRID * errors[:, k + 1])
        result[:, k] = np.maximum(result[:, k], np.where(noisy, result[:, k + 1] * _JUST_ABOVE, 0.0))
    return result


def squared_errors(codes: Sequence[WeightCodes], rows: NDArray[np.float32]) -> Float:
    """Return ‖ΔW‖² of each channel [units, widths] for `codes` of each width; rows [units, K]: the float weights."""
    return np.stack([np.square(c.change(rows), dtype=np.float64).sum(axis=1) for c in codes], axis=1)


def picked(variants: Sequence[WeightCodes], best: NDArray[np.int64]) -> WeightCodes:
    """Take each channel from its best variant; best [units]."""
    units = np.arange(len(best))
    integers, scales = (np.stack([getattr(v, name) for v in variants]) for name in ("integers", "scales"))
    return WeightCodes(integers[best, units], scales[best, units])


def noise_share(draws: int, spread: float) -> float:
    """Return the share of noise in the variance of means of `draws` squares whose true relative spread is `spread`."""
    return (2 / draws) / (2 / draws + spread**2)
