"""Augmented copies of few images, so that moments show more of what a layer may get.

Behind many reductions an image leaves a few vectors that are much alike, fewer than their channels. Rounding then moves
its errors to where those images show little and others do not. Flipped, shifted and mixed copies fill some of that; of
digits or text they may show what never comes, so they count only where moments with them suit other images better.
"""

from collections.abc import Sequence

import numpy as np

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.augmentation import copies
from rdoq_onnx.calibration.samples import InputSpec, Samples, input_specs
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.model.layers import Layer, input_channels

MOST = 512  # images with their copies
_EACH = 4  # copies of an image
_DAMPING = 0.1  # of the covariance, as a share of its mean diagonal
_TINY = 1e-30


def number_of_copies(network: Network, count: int) -> int:
    """Return how many copies of `count` samples to make: 0 unless they are images, and fewer than a layer's channels.

    An image is the only input, float [samples, 1 or 3 channels, height, width], of single samples or any number.
    """
    widest = max((input_channels(layer.linear) for layer in network.layers), default=0)
    match input_specs(network.model):
        case [InputSpec(shape=(None | 1, 1 | 3, _, _), dtype=np.float32)] if 1 < count < widest:
            return max(min(_EACH * count, MOST - count), 0)
    return 0


def with_copies(network: Network, samples: Samples, seed: int) -> Samples | None:
    """Return `samples` and their augmented copies; None where these would add nothing."""
    count = number_of_copies(network, len(samples)) if samples.rows == 1 else 0
    return samples.joined(copies(samples, count, seed)) if count else None


def better_suited(
    layers: Sequence[Layer], own: Sequence[Moments], wider: Sequence[Moments], unseen: Sequence[Moments]
) -> dict[Layer, Moments]:
    """Return the `wider` moments of those layers under which `unseen` inputs are likelier than under their `own`.

    The inputs count as a Gaussian vector.
    """
    each = zip(layers, own, wider, unseen, strict=True)
    return {
        layer: more for layer, one, more, other in each if _log_likelihood(more, other) > _log_likelihood(one, other)
    }


def _log_likelihood(moments: Moments, unseen: Moments) -> float:
    """Return the mean of -½ (tr H⁻¹ C + log det H), where C is the covariance of `unseen` and H a damped one."""
    covariance, size = moments.covariance, moments.covariance.shape[-1]
    level = np.maximum(np.einsum("gkk->g", covariance) / size, _TINY)
    hessian = covariance + (_DAMPING * level)[:, None, None] * np.eye(size)
    spread = np.linalg.slogdet(hessian)[1]
    distance = np.einsum("gkk->g", np.linalg.solve(hessian, unseen.covariance))
    return float(-(spread + distance).mean() / 2)
