"""What may be emitted: every channel and every activation at every width."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.model.codes import Affine, WeightCodes

Float = NDArray[np.float64]

FLOAT_LIMIT = 127


@dataclass(frozen=True)
class Candidates:
    """What may be emitted.

    widths: widths of weight channels, rising.
    means: for each layer, the mean of its unfolded input [G, K], which its bias is corrected by.
    weights: for each layer and each variant of rounding, its codes at each of `widths`.
    activations: for each activation, its possible quantizers by width; those of one width differ in their clipping.
    """

    widths: tuple[int, ...]
    means: tuple[Float, ...]
    weights: tuple[tuple[tuple[WeightCodes, ...], ...], ...]
    activations: tuple[Mapping[int, tuple[Affine, ...]], ...]


def widest(network: Network) -> int:
    """The widest weights that the target computes exactly."""
    return network.target.widest if network.activations else MAX_BITS


def integer_limit(network: Network) -> int:
    """The bound on the magnitude of the weights' integers."""
    return network.target.weight_limit if network.activations else FLOAT_LIMIT
