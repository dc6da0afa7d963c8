"""What may be emitted: every channel and every activation at every width."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.layers import Activation, Layer

Float = NDArray[np.float64]

FLOAT_LIMIT = 127


Table = Mapping[int, tuple[Affine, ...]]  # quantizers by width


@dataclass(frozen=True)
class LayerCandidates:
    """What may be emitted for one layer.

    mean: of its unfolded input [G, K], which its bias is corrected by. variants: for each variant of rounding, the
    codes at each of the widths offered.
    """

    layer: Layer
    mean: Float
    variants: tuple[tuple[WeightCodes, ...], ...]


@dataclass(frozen=True)
class ActivationCandidates:
    """The quantizers that an activation may get, by width; those of one width differ in their clipping."""

    activation: Activation
    table: Table

    @property
    def flat(self) -> list[Affine]:
        """All of them, width by width."""
        return [q for several in self.table.values() for q in several]


@dataclass(frozen=True)
class Candidates:
    """What may be emitted. widths: those offered to weight channels, rising."""

    widths: tuple[int, ...]
    layers: tuple[LayerCandidates, ...]
    activations: tuple[ActivationCandidates, ...]


def widest(network: Network) -> int:
    """The widest weights that the target computes exactly."""
    return network.target.widest if network.activations else MAX_BITS


def integer_limit(network: Network) -> int:
    """The bound on the magnitude of the weights' integers."""
    return network.target.weight_limit if network.activations else FLOAT_LIMIT
