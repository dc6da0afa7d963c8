"""Every channel and every activation at every width, just as it would be emitted."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.analysis import FUSION_BITS, Network
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.quantizer import Affine, WeightCodes, affine_candidates, quantize_rows

# u8 x s8 kernels without VNNI add two products in 16 bits: 2 x 255 x 64 fits, 2 x 255 x 127 does not. Weights beside
# integer activations therefore take 7 bits at most, and the numbers are the same on every CPU.
INTEGER_LIMIT = 64
FLOAT_LIMIT = 127
# ONNX Runtime stores a bias as INT32 in units of (activation scale x weight scale).
_BIAS_LIMIT = 2.0**29


@dataclass(frozen=True)
class Candidates:
    """What may be emitted.

    widths: widths of weight channels, rising.
    weights: for each layer, its codes at each of `widths`.
    activations: for each activation, its possible quantizers by width; those of one width differ in their clipping.
    """

    widths: tuple[int, ...]
    weights: tuple[tuple[WeightCodes, ...], ...]
    activations: tuple[Mapping[int, tuple[Affine, ...]], ...]


def widest(integer_activations: bool) -> int:
    """The widest weights that are exact on every CPU."""
    return 7 if integer_activations else MAX_BITS


def make_candidates(
    network: Network, widths: tuple[int, ...], ranges: Mapping[str, tuple[float, float]]
) -> Candidates:
    """Quantize all layers and activations of `network`.

    widths: those that weight channels may take. ranges: least and greatest value of each activation on the samples.
    """
    integer = bool(network.activations)
    quantizers = tuple(
        {
            bits: tuple(affine_candidates(*ranges[a.tensor], bits))
            for bits in ((FUSION_BITS,) if a.fusion else range(1, MAX_BITS + 1))
        }
        for a in network.activations
    )
    floors = _scale_floors(network, ranges)
    limit = INTEGER_LIMIT if integer else FLOAT_LIMIT
    tensors = {t.name: t for t in network.model.graph.initializer}
    weights = []
    for layer, floor in zip(network.layers, floors, strict=True):
        rows = layer.linear.rows(numpy_helper.to_array(tensors[layer.weight]))
        weights.append(tuple(quantize_rows(rows, b, limit, floor) for b in widths))
    return Candidates(widths, tuple(weights), quantizers)


def _scale_floors(
    network: Network, ranges: Mapping[str, tuple[float, float]]
) -> list[NDArray[np.float64] | None]:
    """The least scale of each channel with which its bias still fits INT32 in the integer kernels."""
    sources = {feed: a.tensor for a in network.activations for feed in a.feeds}
    nodes = {n.name: n for n in network.model.graph.node}
    tensors = {t.name: t for t in network.model.graph.initializer}
    floors: list[NDArray[np.float64] | None] = []
    for layer in network.layers:
        node, use = nodes[layer.uses[0].node], layer.uses[0]
        bias = tensors.get(node.input[2]) if len(node.input) > 2 else None
        if bias is None or use.data not in sources or layer.linear.op_type == "ConvTranspose":
            floors.append(None)
            continue
        low, high = ranges[sources[use.data]]
        step = max(high, 0.0) - min(low, 0.0)
        values = np.abs(numpy_helper.to_array(bias).astype(np.float64)).reshape(-1)
        spread = np.broadcast_to(values, (layer.linear.channels,)) if values.size == 1 else values
        # The narrowest activation quantizer has the finest scale: a tenth of the range over 255 steps.
        floors.append(spread / (_BIAS_LIMIT * max(step / 2550, 1e-30)) if step > 0 else None)
    return floors
