"""Every channel and every activation at every width, just as it would be emitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
_DAMPING = 0.02  # of the diagonal that counts where scales are first searched, as a share of its mean
# Scales tried with compensation, relative to the best one without.
_TRIALS = (0.76, 0.88, 1.0, 1.12, 1.26)
_FINE_TRIALS = (0.94, 1.0)
_FINE_LEVELS = 31
# ONNX Runtime stores a bias as INT32 in units of (activation scale x weight scale).
_BIAS_LIMIT = 2.0**29
_TINY = 1e-30
_TRIED_AT_ONCE = 1 << 12  # rows times trials that are rounded at a time: some columns of them fit the cache

Float = NDArray[np.float64]
Rows = NDArray[np.floating[Any]]


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
    *,
    uncertain: bool = False,
) -> Candidates:
    """Quantize all layers and activations of `network`.

    widths: those that weight channels may take. ranges: least and greatest value of each activation on the samples.
    moments: of each layer's input. uncertain: the samples are too few to clip ranges by what they show.
    """
    quantizers = tuple(
        {
            bits: tuple(affine_candidates(*ranges[a.tensor], bits, network.target.symmetric, uncertain))
            for bits in ((FUSION_BITS,) if a.fusion else range(1, MAX_BITS + 1))
        }
        for a in network.activations
    )
    limit = integer_limit(network)
    layers = [
        LayerRows(Blocks(layer.linear), network.rows(layer), limit, floor)
        for layer, floor in zip(network.layers, scale_floors(network, ranges), strict=True)
    ]
    # The largest first, or one thread would be left with it while the others are done.
    largest = sorted(range(len(layers)), key=lambda k: -moments[k].covariance.size * len(layers[k].rows))
    nearest = workers.map(lambda k: layers[k].starts(moments[k].covariance, widths), largest)
    starts = dict(zip(largest, nearest, strict=True))
    tasks = [(k, variant) for k in largest for variant in moments[k].variants()]
    codes = workers.map(lambda task: layers[task[0]].codes(*task[1], starts[task[0]]), tasks)
    found: dict[int, list[tuple[WeightCodes, ...]]] = {}
    for (k, _), several in zip(tasks, codes, strict=True):
        found.setdefault(k, []).append(tuple(several.values()))
    weights = tuple(tuple(found[k]) for k in range(len(layers)))
    return Candidates(widths, tuple(m.mean for m in moments), weights, quantizers)


@dataclass(frozen=True)
class LayerRows:
    """A layer to round: its weights as rows [units, weights of a row].

    limit: bound on the integers' magnitude. least_scale [units]: scales may not be smaller.
    """

    blocks: Blocks
    rows: Rows
    limit: int
    least_scale: Float | None

    def starts(self, covariance: Float, widths: tuple[int, ...]) -> dict[int, WeightCodes]:
        """Rounded to nearest at each width; weights count as their inputs vary."""
        diagonal = np.einsum("gkk->gk", covariance)
        diagonal = diagonal + _DAMPING * np.maximum(diagonal.mean(axis=1, keepdims=True), _TINY)
        blocks = self.blocks.cut(self.rows)
        importance = self.blocks.join(np.broadcast_to(diagonal[:, None, :], blocks.shape))
        return {b: quantize_rows(self.rows, b, self.limit, self.least_scale, importance) for b in widths}

    def codes(self, second: Float, damping: float, starts: Mapping[int, WeightCodes]) -> dict[int, WeightCodes]:
        """Rounded with error compensation under a second moment, at each width, at scales around those of `starts`."""
        trials = {b: _Trials.around(c.scales, *window(self.rows, b, self.limit)) for b, c in starts.items() if b}
        if not trials:
            return dict(starts)
        compensator = Compensator.of(second, damping)
        floor = scale_floor(self.rows, self.least_scale)
        found = _compensated(self.blocks, self.rows.astype(np.float32), compensator, list(trials.values()), floor)
        return {**starts, **dict(zip(trials, found, strict=True))}


@dataclass(frozen=True)
class _Trials:
    """Scales to try for each row at one width, [units, T], and the integers' bounds."""

    scales: Float
    low: Float
    high: Float

    @classmethod
    def around(cls, scales: NDArray[np.float32], low: Float, high: Float) -> "_Trials":
        factors = np.array(_TRIALS if high.max() - low.min() < _FINE_LEVELS else _FINE_TRIALS)
        tried = scales[:, None] * factors
        return cls(tried, *(np.broadcast_to(bound[:, None], tried.shape) for bound in (low, high)))


def _compensated(
    blocks: Blocks, rows: NDArray[np.float32], compensator: Compensator, widths: Sequence[_Trials], floor: Float
) -> list[WeightCodes]:
    """For each width the best of its trials for each row, by the error on the layer's output."""
    low, high = (np.concatenate([getattr(w, name) for w in widths], axis=1) for name in ("low", "high"))
    tried = stored(np.maximum(np.concatenate([w.scales for w in widths], axis=1), floor[:, None]))
    ends = np.cumsum([w.scales.shape[1] for w in widths])
    integers = np.empty((len(rows), len(widths), rows.shape[1]), np.int8)
    picks = np.empty((len(rows), len(widths)), np.int64)
    # Any subset of rows can be cut into blocks on its own where there is one group.
    size = max(1, _TRIED_AT_ONCE // tried.shape[1]) if blocks.single else len(rows)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        bounds = (blocks.spread(v[part]).astype(np.float32) for v in (tried, low, high))
        q, loss = compensator.round(blocks.cut(rows[part]), *bounds)
        for w, losses in enumerate(np.split(blocks.gather(loss, tried.shape[1]), ends[:-1], axis=1)):
            picks[part, w] = losses.argmin(axis=1) + ends[w] - losses.shape[1]
        best = blocks.spread(picks[part]).reshape(len(q), 1, -1, len(widths))
        kept = np.take_along_axis(q.swapaxes(1, 2).reshape(*q.shape[::2], -1, tried.shape[1]), best, axis=3)
        for w in range(len(widths)):
            integers[part, w] = blocks.join(kept[..., w].swapaxes(1, 2))
    scales = np.take_along_axis(tried, picks, axis=1)
    if blocks.parts == 1 and not blocks.shared:
        scales = _refitted(blocks, rows, integers, compensator, scales, floor)
    return [WeightCodes(q, s.astype(np.float32)) for q, s in zip(integers.swapaxes(0, 1), scales.T, strict=True)]


def _refitted(
    blocks: Blocks, rows: NDArray[np.float32], integers: NDArray[np.int8], compensator: Compensator, scales: Float,
    floor: Float,
) -> Float:  # fmt: skip
    """The scales [units, W] of least error for integers [units, W, K]."""
    count = integers.shape[1]
    grouped = integers.reshape(blocks.linear.group, -1, integers.shape[2])
    weights = np.repeat(blocks.cut(rows), count, axis=1)
    least = blocks.spread(np.broadcast_to(floor[:, None], scales.shape))
    found = compensator.refit(weights, grouped, blocks.spread(scales), least)
    return stored(blocks.gather(found, count))


def scale_floors(
    network: Network, ranges: Mapping[str, tuple[float, float]]
) -> list[Float | None]:
    """The least scale of each channel with which its bias still fits INT32 in the integer kernels."""
    sources = {feed: a.tensor for a in network.activations for feed in a.feeds}
    graph = Graph(network.model)
    nodes = {n.name: n for n in graph.nodes}
    floors: list[Float | None] = []
    for layer in network.layers:
        found = [
            _scale_floor(layer, _bias(nodes[use.node], graph), ranges[sources[use.data]])
            for use in layer.uses
            if use.data in sources and layer.linear.op_type != "ConvTranspose"
        ]
        known = [floor for floor in found if floor is not None]
        floors.append(np.maximum.reduce(known) if known else None)
    return floors


def _scale_floor(layer: Layer, bias: TensorProto | None, data: tuple[float, float]) -> Float | None:
    """For one use of `layer`, whose data input spans the range `data`."""
    step = max(data[1], 0.0) - min(data[0], 0.0)
    if bias is None or step <= 0:
        return None
    values = np.abs(numpy_helper.to_array(bias).astype(np.float64))
    aligned = values.ndim and values.shape[-1] == layer.linear.channels
    spread = values.reshape(-1, layer.linear.channels).max(axis=0) if aligned else values.max(initial=0.0)
    # The narrowest activation quantizer has the finest scale: a tenth of the range over 255 steps.
    floor = spread / (_BIAS_LIMIT * max(step / 2550, 1e-30))
    return np.broadcast_to(floor, (layer.linear.channels,))


def _bias(node: NodeProto, graph: Graph) -> TensorProto | None:
    """A layer's bias. ONNX Runtime makes one Gemm of a MatMul and the Add behind it."""
    if len(node.input) > 2:
        return graph.initializers.get(node.input[2])
    reader = graph.sole_consumer(node.output[0])
    if node.op_type != "MatMul" or reader is None or reader.op_type != "Add":
        return None
    return next((graph.initializers[i] for i in reader.input if i in graph.initializers), None)
