"""Scale and bias of each output channel, fitted to the float network at the inputs that the quantized one really has.

What reaches a layer of the quantized network carries noise and has been clipped, so its outputs z' have another mean
and another gain than those of the float network, z. The least squares line through both,

    z ≈ α z' + β,    α = Cov(z, z') / Var(z'),    β = E[z] - α E[z'],

costs nothing in the emitted file: α goes into the channel's weight scale, β into its bias. Layers are fitted in the
order of execution, each behind those that were fitted before it: what one of them has set right the next need not.

A few huge activations that are clipped would draw a line to themselves, at the cost of all others: where z' is off by
more than a few times the mean deviation it is left out. The last layers of a network, where positions are few and what
is wrong with them is not noise any more, are better left alone, but for those that give its outputs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.emission.quantized_model import bias_shift, chosen_weights, mixed
from rdoq_onnx.model.codes import WeightCodes, stored
from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.refinement.stages import staged
from rdoq_onnx.system.runtime import Feeds, Runtime
from rdoq_onnx.system.threads import Workers

_SAMPLES = 128
_LIVE = 1 << 29  # bytes of tensors of all samples together that may wait for later layers
_KEPT = 1 << 25  # elements of the float network's z that are kept
_POSITIONS = 64  # of a sample that are looked at, about, where so many can be kept
_OUTLIERS = 4.0  # times the mean deviation
_MIN_GAIN, _MAX_GAIN = 0.5, 1.5  # a gain beyond reflects the few samples, not the channel

Array = NDArray[Any]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Fitting:
    """What layers are fitted with.

    kept: keeps what the float network gives, up to 128 MB, for other allocations of the same measurement and layers.
    """

    samples: Samples
    runtime: Runtime
    workers: Workers
    kept: Steps | None = None


def refitted(allocation: Allocation, emitted: onnx.ModelProto, chosen: Sequence[int], fitting: Fitting) -> Allocation:
    """`allocation` with scales and biases of the layers `chosen` (indices, see `fitted_layers`) fitted.

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

    def wanted() -> dict[str, Array]:
        return _float_outputs(network, [layer for _, layer in layers], batches, positions, runtime)

    expected = wanted() if kept is None else kept.once("layers fitted, in float", wanted)
    weights, counts = chosen_weights(allocation), [count for count, _ in batches]
    made = {n.name: n.output[0] for n in emitted.graph.node}
    ends = {made[layer.uses[0].node]: k for k, layer in layers}
    measured = list(measurement.layers)
    for stop, values in staged(emitted, list(ends), [feeds for _, feeds in batches], runtime):
        k = ends[stop]
        layer, _, shift = weights[k]
        # The Add behind a MatMul has the shift, so its z' does not.
        added = shift if layer.linear.op_type == "MatMul" else np.zeros_like(shift)
        found = workers.map(partial(_rows, layer.linear, positions), values, counts)
        z = np.concatenate(found, axis=1) + added[:, None].astype(np.float32)
        gain, rest = _lines(expected[layer.name], z, workers)
        scaled = {b: _scaled(code, gain) for b, code in measured[k].codes.items()}
        bias, weight = _constants(network, layer)
        change = mixed(scaled, allocation.layer_bits[k]).values - layer.linear.rows(weight)
        offset = gain * (bias + shift) + rest - bias - bias_shift(layer, change, measured[k].mean)
        measured[k] = replace(measured[k], codes=scaled, offset=offset)
        values[:] = workers.map(partial(_moved, layer.linear, gain, gain * added + rest - added), values, counts)
    return replace(allocation, measurement=replace(measurement, layers=tuple(measured)))


def _scaled(code: WeightCodes, gain: Float) -> WeightCodes:
    """`code` with the scale of each channel times `gain`."""
    return WeightCodes(code.integers, stored(code.scales * gain).astype(np.float32))


def fitted_layers(allocation: Allocation, share: float) -> list[int]:
    """Indices of the layers that can be fitted, of the first `share` of them and the last ones.

    Those are layers of which each output channel has a scale of its own, which are applied once, and whose bias is
    constant: a computed one would have to be scaled, too.
    """
    network = allocation.measurement.network
    graph = Graph(network.model)
    nodes, layers = {n.name: n for n in graph.nodes}, {layer.name for layer in network.layers}
    last = _last(graph, layers, allocation.measurement.observation.metric.outputs)
    return [
        k for k, layer in enumerate(network.layers)
        if (k < share * len(network.layers) or layer.name in last)
        and len(layer.uses) == 1
        and layer.linear.op_type != "ConvTranspose"
        and all(name in graph.initializers for name in nodes[layer.name].input[2:] if name)
        and attribute(nodes[layer.name], "beta", 1.0)  # without it the shift is in an Add behind the layer
    ]  # fmt: skip


def _last(graph: Graph, layers: Collection[str], outputs: Sequence[str]) -> set[str]:
    """Those of `layers` with no other one between them and an output."""
    found: set[str] = set()
    seen, pending = set(outputs), list(outputs)
    while pending:
        node = graph.producer.get(pending.pop())
        if node is not None and node.name in layers:
            found.add(node.name)
        elif node is not None:
            pending += [i for i in node.input if i not in seen]
            seen.update(node.input)
    return found


def _float_outputs(
    network: Network, layers: Sequence[Layer], batches: Sequence[tuple[int, Feeds]], positions: int, runtime: Runtime
) -> dict[str, Array]:
    """z of the float network for each of `layers`, [channels, points]."""
    session = runtime.session(with_outputs(network.model, [layer.uses[0].output for layer in layers]), "all")
    found: dict[str, list[Array]] = {layer.name: [] for layer in layers}
    for count, feeds in batches:
        for layer, z in zip(layers, session.run(feeds), strict=True):
            found[layer.name].append(_rows(layer.linear, positions, z, count))
    return {name: np.concatenate(rows, axis=1) for name, rows in found.items()}


def _rows(linear: Linear, positions: int, z: Array, samples: int) -> Array:
    """A layer's output at about so many positions of each sample, [channels, points]."""
    blocks = linear.outputs(z, samples)
    every = blocks.shape[-1] // positions | 1  # odd, so as not to walk down one column of an image
    picked = np.moveaxis(blocks[..., ::every], 0, 2).astype(np.float32)
    return picked.reshape(linear.channels, -1)


def _moved(linear: Linear, gain: Float, rest: Float, z: Array, samples: int) -> Array:
    """gain z + rest for each channel; `z` may be overwritten, since large arrays take longer to get than to fill."""
    blocks = linear.outputs(z, samples)
    gain, rest = (v.astype(z.dtype).reshape(*blocks.shape[1:3], 1) for v in (gain, rest))
    blocks *= gain
    blocks += rest
    return linear.refold(blocks, z.shape)


def _lines(expected: Array, found: Array, workers: Workers) -> tuple[Float, Float]:
    """(α, β) of each channel, [channels, points] both, some channels on each thread."""
    lines = workers.map(_line, np.array_split(expected, workers.threads), np.array_split(found, workers.threads))
    gains, rests = zip(*lines, strict=True)
    return np.concatenate(gains), np.concatenate(rests)


def _line(expected: Array, found: Array) -> tuple[Float, Float]:
    """(α, β) of each channel; α is 1 where the channel hardly varies."""
    off = found - expected
    middle = off.shape[1] // 2
    off = np.abs(off - np.partition(off, middle, axis=1)[:, middle, None])  # np.median takes ten times as long
    kept = (off <= _OUTLIERS * off.mean(axis=1, keepdims=True)).astype(np.float32)
    count = np.maximum(kept.sum(axis=1, dtype=np.float64), 1)
    means = [(v * kept).sum(axis=1, dtype=np.float64) / count for v in (expected, found)]
    z, q = ((v - m[:, None].astype(np.float32)) * kept for v, m in zip((expected, found), means, strict=True))
    variance, covariance = ((v * q).sum(axis=1, dtype=np.float64) / count for v in (q, z))
    steady = variance <= 1e-9 * np.maximum(variance + means[1] ** 2, 1e-30)
    gain = np.where(steady, 1.0, np.clip(covariance / np.where(steady, 1.0, variance), _MIN_GAIN, _MAX_GAIN))
    return gain, means[0] - gain * means[1]


def _constants(network: Network, layer: Layer) -> tuple[Float, Array]:
    """The bias within the layer's own output, zero where it has none, and its weight."""
    node = next(n for n in network.model.graph.node if n.name == layer.name)
    tensors = {t.name: t for t in network.model.graph.initializer}
    weight = numpy_helper.to_array(tensors[layer.weight])
    if len(node.input) < 3 or node.input[2] not in tensors:
        return np.zeros(layer.linear.channels), weight
    bias = attribute(node, "beta", 1.0) * numpy_helper.to_array(tensors[node.input[2]]).astype(np.float64)
    return np.broadcast_to(bias.reshape(-1), (layer.linear.channels,)), weight
