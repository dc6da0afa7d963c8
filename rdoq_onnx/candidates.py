"""Every channel and every activation at every width, just as it would be emitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from rdoq_onnx.analysis import FUSION_BITS, Layer, Network
from rdoq_onnx.blocks import Blocks
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.graph import Graph
from rdoq_onnx.moments import Moments
from rdoq_onnx.parallel import Workers
from rdoq_onnx.quantizer import Affine, WeightCodes, affine_candidates, quantize_rows, scale_floor, stored, window
from rdoq_onnx.rounding import Compensator

FLOAT_LIMIT = 127
# Shares of its mean diagonal added to a layer's covariance. Few samples want much; curves on other samples decide.
DAMPINGS = (0.02, 0.3)
# Scales tried with compensation, relative to the best one without.
_TRIALS = (0.76, 0.88, 1.0, 1.12, 1.26)
_FINE_TRIALS = (0.94, 1.0)
_FINE_LEVELS = 31
# ONNX Runtime stores a bias as INT32 in units of (activation scale x weight scale).
_BIAS_LIMIT = 2.0**29
_WORKING_SET = 1 << 26  # bytes of rows that are rounded at a time

Float = NDArray[np.float64]


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


def make_candidates(
    network: Network,
    widths: tuple[int, ...],
    ranges: Mapping[str, tuple[float, float]],
    moments: Sequence[Moments],
    workers: Workers,
) -> Candidates:
    """Quantize all layers and activations of `network`.

    widths: those that weight channels may take. ranges: least and greatest value of each activation on the samples.
    moments: of each layer's input.
    """
    quantizers = tuple(
        {
            bits: tuple(affine_candidates(*ranges[a.tensor], bits, network.target.symmetric))
            for bits in ((FUSION_BITS,) if a.fusion else range(1, MAX_BITS + 1))
        }
        for a in network.activations
    )
    limit = integer_limit(network)
    tensors = {t.name: t for t in network.model.graph.initializer}

    def quantize(item: tuple[Layer, Moments, Float | None]) -> tuple[tuple[WeightCodes, ...], ...]:
        layer, moment, floor = item
        rows = layer.linear.rows(numpy_helper.to_array(tensors[layer.weight])).astype(np.float64)
        compensators = [Compensator.of(moment.covariance, damping) for damping in DAMPINGS]
        return tuple(layer_codes(Blocks(layer.linear), rows, c, widths, limit, floor) for c in compensators)

    items = zip(network.layers, moments, scale_floors(network, ranges), strict=True)
    weights = tuple(workers.map(quantize, items))
    return Candidates(widths, tuple(m.mean for m in moments), weights, quantizers)


def layer_codes(
    blocks: Blocks,
    rows: Float,
    compensator: Compensator,
    widths: tuple[int, ...],
    limit: int,
    least_scale: Float | None,
) -> tuple[WeightCodes, ...]:
    """`rows` [units, weights of a row] of a layer, rounded with error compensation at each width."""
    diagonal = np.einsum("gkk->gk", compensator.hessian)[:, None, :]
    units = blocks.cut(rows).shape[1]
    importance = blocks.join(np.broadcast_to(diagonal, (len(diagonal), units, diagonal.shape[2])))
    floor = scale_floor(rows, least_scale)
    found = []
    for bits in widths:
        start = quantize_rows(rows, bits, limit, least_scale, importance)
        if bits:
            start = _compensated(blocks, rows, compensator, start.scales, window(rows, bits, limit), floor)
        found.append(start)
    return tuple(found)


def _compensated(
    blocks: Blocks, rows: Float, compensator: Compensator, scales: NDArray[np.float32], bounds: tuple[Float, Float],
    floor: Float,
) -> WeightCodes:  # fmt: skip
    """The best of several scales around `scales` for each row, by the error on the layer's output."""
    integers, chosen = np.empty(rows.shape), np.empty(len(rows))
    trials = np.array(_TRIALS if bounds[1].max() - bounds[0].min() < _FINE_LEVELS else _FINE_TRIALS)
    size = max(1, _WORKING_SET // (8 * rows.shape[1] * len(trials))) if blocks.single else len(rows)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        tried = stored(np.maximum(scales[part, None] * trials, floor[part, None]))
        low, high = (np.broadcast_to(bound[part, None], tried.shape) for bound in bounds)
        weights = np.repeat(blocks.cut(rows[part]), len(trials), axis=1)
        q, loss = compensator.round(weights, blocks.spread(tried), blocks.spread(low), blocks.spread(high))
        pick = blocks.gather(loss, len(trials)).argmin(axis=1)
        best = blocks.spread(pick[:, None])[:, :, None, None]
        kept = np.take_along_axis(q.reshape(len(q), -1, len(trials), q.shape[2]), best, axis=2)[:, :, 0]
        integers[part], chosen[part] = blocks.join(kept), tried[np.arange(len(pick)), pick]
    if blocks.parts == 1 and not blocks.shared:
        spread = blocks.spread(chosen[:, None]), blocks.spread(floor[:, None])
        chosen = blocks.gather(compensator.refit(blocks.cut(rows), blocks.cut(integers), *spread), 1)[:, 0]
    return WeightCodes(integers.astype(np.int8), stored(chosen).astype(np.float32))


def scale_floors(
    network: Network, ranges: Mapping[str, tuple[float, float]]
) -> list[Float | None]:
    """The least scale of each channel with which its bias still fits INT32 in the integer kernels."""
    sources = {feed: a.tensor for a in network.activations for feed in a.feeds}
    graph = Graph(network.model)
    nodes = {n.name: n for n in graph.nodes}
    floors: list[Float | None] = []
    for layer in network.layers:
        node, use = nodes[layer.uses[0].node], layer.uses[0]
        bias = _bias(node, graph)
        if bias is None or use.data not in sources or layer.linear.op_type == "ConvTranspose":
            floors.append(None)
            continue
        low, high = ranges[sources[use.data]]
        step = max(high, 0.0) - min(low, 0.0)
        values = np.abs(numpy_helper.to_array(bias).astype(np.float64))
        aligned = values.ndim and values.shape[-1] == layer.linear.channels
        spread = values.reshape(-1, layer.linear.channels).max(axis=0) if aligned else values.max(initial=0.0)
        # The narrowest activation quantizer has the finest scale: a tenth of the range over 255 steps.
        floor = spread / (_BIAS_LIMIT * max(step / 2550, 1e-30))
        floors.append(np.broadcast_to(floor, (layer.linear.channels,)) if step > 0 else None)
    return floors


def _bias(node: NodeProto, graph: Graph) -> TensorProto | None:
    """A layer's bias. ONNX Runtime makes one Gemm of a MatMul and the Add behind it."""
    if len(node.input) > 2:
        return graph.initializers.get(node.input[2])
    reader = graph.sole_consumer(node.output[0])
    if node.op_type != "MatMul" or reader is None or reader.op_type != "Add":
        return None
    return next((graph.initializers[i] for i in reader.input if i in graph.initializers), None)
