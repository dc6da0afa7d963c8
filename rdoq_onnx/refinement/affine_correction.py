"""Fit scale and bias of each output channel to the float network, at the inputs that the quantized network produces.

The inputs of a layer in the quantized network are noisy and clipped, so its outputs z' have a different mean and gain
from those of the float network, z. The least-squares line through both,

    z ≈ α z' + β,    α = Cov(z, z') / Var(z'),    β = E[z] - α E[z'],

costs nothing in the emitted file: α goes into the channel's weight scale, β into its bias. Layers are fitted in order
of execution, each behind the already fitted ones, so that no error is corrected twice.

A few huge clipped activations would dominate the fit at the cost of all others, so points where z' is off by more than
a few times the mean deviation are left out. The last layers of a network have few positions, and their error is no
longer noise: they are better left alone, except for those that produce the network's outputs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.emission.quantized_model import bias_shift, chosen_weights, mixed
from rdoq_onnx.model import external
from rdoq_onnx.model.codes import WeightCodes, halved, stored
from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.refinement.stages import staged
from rdoq_onnx.system.runtime import Feeds, Runtime
from rdoq_onnx.system.threads import Workers

_SAMPLES = 128
_LIVE = 1 << 29  # bytes of tensors, of all samples together, kept for later layers
_KEPT = 1 << 25  # elements kept of the float network's z
_POSITIONS = 64  # approximate number of positions per sample that enter the fit, if that many can be kept
_OUTLIERS = 4.0  # times the mean deviation
_MIN_GAIN, _MAX_GAIN = 0.5, 1.5  # a gain outside reflects the few samples, not the channel

Array = NDArray[Any]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Fitting:
    """The means to fit layers.

    kept: stores outputs of the float network, up to 128 MB, for other allocations of the same measurement and layers.
    """

    samples: Samples
    runtime: Runtime
    workers: Workers
    kept: Steps | None = None


def refitted(allocation: Allocation, emitted: onnx.ModelProto, chosen: Sequence[int], fitting: Fitting) -> Allocation:
    """Fit scales and biases of the layers `chosen` (indices, see `fitted_layers`).

    emitted: the `quantized_model` of `allocation`.
    """
    samples, runtime, workers, kept = fitting.samples, fitting.runtime, fitting.workers, fitting.kept
    measurement = allocation.measurement
    network = measurement.network
    layers = [(k, network.layers[k]) for k in chosen]
    if not layers:
        return allocation
    some = samples.some(min(_SAMPLES, max(1, _LIVE // (8 * max(measurement.observation.sizes.values())))))
    batches = list(some.counted_batches(measurement.observation.batching.size))
    positions = max(1, min(_POSITIONS, _KEPT // (len(some) * sum(layer.linear.channels for _, layer in layers))))

    def float_outputs() -> dict[str, Array]:
        return _float_outputs(network, [layer for _, layer in layers], batches, positions, runtime)

    references = float_outputs() if kept is None else kept.once("layers fitted, in float", float_outputs)
    weights, counts = chosen_weights(allocation), [count for count, _ in batches]
    outputs = {n.name: n.output[0] for n in emitted.graph.node}
    stops = {outputs[layer.uses[0].node]: k for k, layer in layers}
    measured = list(measurement.layers)
    for stop, values in staged(emitted, list(stops), [feeds for _, feeds in batches], runtime):
        k = stops[stop]
        layer, _, shift = weights[k]
        # A MatMul has its shift in the Add behind it, so z' lacks it.
        added = shift if layer.linear.op_type == "MatMul" else np.zeros_like(shift)
        rows = workers.map(partial(_rows, layer.linear, positions), values, counts)
        z = np.concatenate(rows, axis=1) + added[:, None].astype(np.float32)
        gain, rest = _lines(references[layer.name], z, workers)
        scaled = _scaled(measured[k].codes, gain)
        bias, weight = _constants(network, layer)
        change = mixed(scaled, allocation.layer_bits[k]).change(layer.linear.rows(weight))
        offset = gain * (bias + shift) + rest - bias - bias_shift(layer, change, measured[k].mean)
        measured[k] = replace(measured[k], codes=scaled, offset=offset)
        correct = partial(_scaled_and_shifted, layer.linear, gain, gain * added + rest - added)
        values[:] = workers.map(correct, values, counts)
    return replace(allocation, measurement=replace(measurement, layers=tuple(measured)))


def _scaled(codes: Mapping[int, WeightCodes], gain: Float) -> Mapping[int, WeightCodes]:
    """Multiply the scale of each channel by `gain`; one of 1 leaves the scale at its full precision."""

    def times_gain(scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of one width: [units], or of blocks [units, B]."""
        if scales.ndim == 1:
            return np.where(gain == 1, scales, stored(scales * gain)).astype(np.float32)
        return halved(scales * gain[:, None]).astype(np.float32)

    if isinstance(codes, SpooledCodes):
        return codes.scaled(np.stack([times_gain(scales) for scales in codes.scales]))
    return {b: WeightCodes(code.integers, times_gain(code.scales)) for b, code in codes.items()}


def fitted_layers(allocation: Allocation, share: float) -> list[int]:
    """Return indices of layers that can be fitted, among the first `share` of all layers and the last ones.

    A layer can be fitted if each output channel has a scale, the layer is applied once, and its bias is constant: a
    computed bias would have to be scaled as well.
    """
    network = allocation.measurement.network
    graph = Graph(network.model)
    nodes, layers = {n.name: n for n in graph.nodes}, {layer.name for layer in network.layers}
    last = _last(graph, layers, allocation.measurement.observation.metric.outputs)
    return [
        k
        for k, layer in enumerate(network.layers)
        if (k < share * len(network.layers) or layer.name in last)
        and len(layer.uses) == 1
        and layer.linear.op_type != "ConvTranspose"
        and all(name in graph.initializers for name in nodes[layer.name].input[2:] if name)
        and attribute(nodes[layer.name], "beta", 1.0)  # with beta 0 the shift is in an Add behind the layer
    ]


def _last(graph: Graph, layers: Collection[str], outputs: Sequence[str]) -> set[str]:
    """Return those of `layers` with no other layer between them and an output."""
    last: set[str] = set()
    seen, pending = set(outputs), list(outputs)
    while pending:
        node = graph.producer.get(pending.pop())
        if node is not None and node.name in layers:
            last.add(node.name)
        elif node is not None:
            pending += [i for i in node.input if i not in seen]
            seen.update(node.input)
    return last


def _float_outputs(
    network: Network, layers: Sequence[Layer], batches: Sequence[tuple[int, Feeds]], positions: int, runtime: Runtime
) -> dict[str, Array]:
    """Return z of the float network for each of `layers`, [channels, points]."""
    session = runtime.session(with_outputs(network.model, [layer.uses[0].output for layer in layers]), "all")
    rows: dict[str, list[Array]] = {layer.name: [] for layer in layers}
    for count, feeds in batches:
        for layer, z in zip(layers, session.run(feeds), strict=True):
            rows[layer.name].append(_rows(layer.linear, positions, z, count))
    return {name: np.concatenate(parts, axis=1) for name, parts in rows.items()}


def _rows(linear: Linear, positions: int, z: Array, samples: int) -> Array:
    """Return a layer's output at about `positions` positions of each sample, [channels, points]."""
    blocks = linear.outputs(z, samples)
    step = blocks.shape[-1] // positions | 1  # odd, so as not to stay in one column of an image
    picked = np.moveaxis(blocks[..., ::step], 0, 2).astype(np.float32)
    return picked.reshape(linear.channels, -1)


def _scaled_and_shifted(linear: Linear, gain: Float, rest: Float, z: Array, samples: int) -> Array:
    """Return gain z + rest for each channel; may overwrite `z`: allocating large arrays is slower than filling them."""
    blocks = linear.outputs(z, samples)
    gain, rest = (v.astype(z.dtype).reshape(*blocks.shape[1:3], 1) for v in (gain, rest))
    blocks *= gain
    blocks += rest
    return linear.refold(blocks, z.shape)


def _lines(reference: Array, output: Array, workers: Workers) -> tuple[Float, Float]:
    """Return (α, β) of each channel of [channels, points], with the channels split over the threads."""
    lines = workers.map(_line, np.array_split(reference, workers.threads), np.array_split(output, workers.threads))
    gains, rests = zip(*lines, strict=True)
    return np.concatenate(gains), np.concatenate(rests)


def _line(reference: Array, output: Array) -> tuple[Float, Float]:
    """Return (α, β) of each channel; α is 1 where the channel hardly varies."""
    off = output - reference
    middle = off.shape[1] // 2
    off = np.abs(off - np.partition(off, middle, axis=1)[:, middle, None])  # np.median is ten times slower
    kept = (off <= _OUTLIERS * off.mean(axis=1, keepdims=True)).astype(np.float32)
    count = np.maximum(kept.sum(axis=1, dtype=np.float64), 1)
    means = [(v * kept).sum(axis=1, dtype=np.float64) / count for v in (reference, output)]
    z, q = ((v - m[:, None].astype(np.float32)) * kept for v, m in zip((reference, output), means, strict=True))
    variance, covariance = ((v * q).sum(axis=1, dtype=np.float64) / count for v in (q, z))
    constant = variance <= 1e-9 * np.maximum(variance + means[1] ** 2, 1e-30)
    gain = np.where(constant, 1.0, np.clip(covariance / np.where(constant, 1.0, variance), _MIN_GAIN, _MAX_GAIN))
    return gain, means[0] - gain * means[1]


def _constants(network: Network, layer: Layer) -> tuple[Float, Array]:
    """Return the bias that the layer itself adds, zero if none, and its weight."""
    node = next(n for n in network.model.graph.node if n.name == layer.name)
    tensors = {t.name: t for t in network.model.graph.initializer}
    weight = external.values(tensors[layer.weight])
    if len(node.input) < 3 or node.input[2] not in tensors:
        return np.zeros(layer.linear.channels), weight
    bias = attribute(node, "beta", 1.0) * external.values(tensors[node.input[2]]).astype(np.float64)
    return np.broadcast_to(bias.reshape(-1), (layer.linear.channels,)), weight
