"""Candidates for emission: every channel and every activation at every width."""

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
    """Candidates of one layer.

    mean: of its unfolded input [G, K], for the bias correction. variants: for each rounding variant, the codes at each
    of the offered widths. blocks: the block size of each variant, see `Layer.blocks`; all 0 if empty.
    """

    layer: Layer
    mean: Float
    variants: tuple[tuple[WeightCodes, ...], ...]
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class ActivationCandidates:
    """Candidate quantizers of an activation, by width; those of one width differ in clipping."""

    activation: Activation
    table: Table

    @property
    def flat(self) -> list[Affine]:
        """All quantizers, width by width."""
        return [q for quantizers in self.table.values() for q in quantizers]


@dataclass(frozen=True)
class Candidates:
    """All candidates. widths: those offered to weight channels, ascending."""

    widths: tuple[int, ...]
    layers: tuple[LayerCandidates, ...]
    activations: tuple[ActivationCandidates, ...]


def widest(network: Network) -> int:
    """Return the widest weights, in bits, that the target computes exactly."""
    return network.target.widest if network.activations else MAX_BITS


def integer_limit(network: Network) -> int:
    """Return the bound on the magnitude of the weights' integers."""
    return network.target.weight_limit if network.activations else FLOAT_LIMIT
