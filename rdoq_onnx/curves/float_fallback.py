"""Float fallback: keep activations and layers in float that even full width would ruin, as measured exactly.

First order misjudges large perturbations both ways: behind a logarithm it overestimates δ a hundredfold, behind a
threshold it underestimates δ as much, as it does for a sample that is rounded to zero in front of a normalization. And
no quantizer with one scale suits a tensor of few wide and many narrow channels, or of loud and quiet samples: one layer
in float then makes a better model than one that a single tensor spoils.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import as_pattern, pins
from rdoq_onnx.analysis.skips import SLOWER, Skip
from rdoq_onnx.analysis.ties import untied
from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates, widest
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.curves.measurement import FloatFallback
from rdoq_onnx.errors import ModelError
from rdoq_onnx.kernels.choice import slow_on_integers
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.model.graph import Graph, after_clamps
from rdoq_onnx.model.layers import Activation, Layer
from rdoq_onnx.observation.equalization import typical_widths
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.probe import Prober, exact_activation
from rdoq_onnx.system.progress import Advance

SAMPLES = (8, 64)  # per exact measurement: minimum and maximum; one sample in twenty may be the one that is ruined
WORK = 3e10  # elements that exact measurements may compute beyond the minimum
# δ at full width, as a share of the signal's power:
_DOUBTFUL = 1e-3  # of one activation or layer (30 dB); above it, first order is checked
_TOLERABLE = 5e-3  # of all activations, or of all layers (23 dB); above it, the worst stay in float
_TOLERABLE_WHERE_CHEAP = 1e-3  # of all activations where float is hardly slower, as in networks with HardSwish
_HARMLESS = 3e-4  # of one activation or layer (35 dB); up to it, it is always quantized
# What remains of a node whose activation stays in float, by whether it is a product of two activations.
_KEPT = ("only its weights are quantized", "integers would cost it more than they save")


def doubtful(network: Network, measured: Distortions, observation: Observation) -> list[int]:
    """Return the indices of activations whose first-order δ at full width is large, or may be far too small.

    An activation that has quiet samples rounds them to zero. Where the network normalizes each sample, the derivative
    in the direction of the sample itself, which is then the error, vanishes.
    """
    limit = _DOUBTFUL * observation.metric.signal
    return [
        k
        for k, (activation, values) in enumerate(zip(network.activations, measured.activations, strict=True))
        if (values[max(values)].min() > limit or activation.tensor in observation.quiet)
        and activation.tensor not in measured.missing
    ]


def checked(
    candidates: Candidates,
    measured: Distortions,
    doubts: Mapping[int, Sequence[Affine]],
    prober: Prober,
    advance: Advance,
) -> tuple[Candidates, Distortions]:
    """Replace the curves of the activations `doubts` by exact ones; `advance(1)` after each.

    Each keeps the best quantizer of each width, and at full width all of them, including the coarse clips that `doubts`
    holds by the activation's index, from before refinement around the best one by first order.
    """
    tables, values = list(candidates.activations), list(measured.activations)
    for k, clips in doubts.items():
        table = tables[k].table
        tried: dict[int, tuple[Affine, ...]] = {
            b: (quantizers[int(np.argmin(values[k][b]))],) for b, quantizers in table.items()
        }
        tried[max(table)] = tuple(dict.fromkeys([*table[max(table)], *clips]))
        tables[k] = replace(tables[k], table=tried)
        values[k] = exact_activation(prober, tables[k])
        advance(1)
    return replace(candidates, activations=tuple(tables)), replace(measured, activations=tuple(values))


def choose_fallback(
    network: Network, candidates: Candidates, measured: Distortions, config: Config, prober: Prober
) -> FloatFallback:
    """Choose the worst activations and layers at full width, until the rest of either is tolerable.

    Chooses nothing pinned, and no layers if `--widths` ends below full width. Raises ModelError if no layer remains.
    """
    pinned = [pattern for pattern, _ in config.pins]
    activations = {
        a.tensor: (float(values[max(values)].min()) / prober.metric.signal, a.names)
        for a, values in zip(network.activations, measured.activations, strict=True)
    }
    layers = {
        each.layer.name: (_share(each, curves, prober), network.names(each.layer))
        for each, curves in zip(candidates.layers, measured.weights, strict=True)
        if candidates.widths[-1] == widest(network)
    }
    cheap = network.hard_swish_inputs and typical_widths(config)[0] == MAX_BITS
    tolerable = _TOLERABLE_WHERE_CHEAP if cheap else _TOLERABLE
    fallback = FloatFallback(_worst(activations, pinned, tolerable), _worst(layers, pinned, _TOLERABLE))
    if network.layers and len(fallback.layers) == len(network.layers):
        name, share = next(iter(fallback.layers.items()))
        raise ModelError(f"no layer can be quantized: {_reason(name, share)}")
    return fallback


def unfed(network: Network, sizes: Mapping[str, int]) -> FloatFallback:
    """Return the layers and activations without elements, for which nothing can be measured.

    sizes: elements of each tensor. Raises ModelError if no layer remains.
    """
    layers = [layer.name for layer in network.layers if not all(sizes[u.data] for u in layer.uses)]
    if network.layers and len(layers) == len(network.layers):
        raise ModelError(f"no layer can be quantized: {_reason(layers[0], 0.0)}")
    tensors = [a.tensor for a in network.activations if not sizes[a.tensor]]
    return FloatFallback(dict.fromkeys(tensors, 0.0), dict.fromkeys(layers, 0.0))


def not_quantized(network: Network, config: Config, sizes: Mapping[str, int]) -> FloatFallback:
    """Return all that stays in float as sizes alone tell."""
    return unfed(network, sizes) | FloatFallback({}, {}, slow_on_integers(network, config, sizes))


def in_float(network: Network, fallback: FloatFallback) -> Network:
    """Return `network` without the layers and activations of `fallback`, and with a Skip for each affected node."""
    if not fallback.tensors and not fallback.layers and not fallback.slow:
        return network
    tensors = {**dict.fromkeys(fallback.slow), **fallback.tensors}
    graph = Graph(network.model)
    skipped = [layer for layer in network.layers if layer.name in fallback.layers]
    skips = [s for layer in skipped for s in _layer_skips(layer, fallback.layers[layer.name], graph)]
    layer_nodes = {s.node for s in skips}
    multiplied = {p.node for p in network.products}
    found = [
        s
        for a in network.activations
        if a.tensor in tensors
        for s in _activation_skips(a, tensors[a.tensor], graph, multiplied)
        if s.node not in layer_nodes
    ]
    skips += {s.node: s for s in found}.values()
    layers = tuple(layer for layer in network.layers if layer.name not in fallback.layers)
    float_inputs = {f for a in network.activations if a.tensor in tensors for f in a.feeds}
    products = tuple(p for p in network.products if float_inputs.isdisjoint(p.operands))
    inputs = {u.data for layer in layers for u in layer.uses} | {o for p in products for o in p.operands}
    float_outputs = {
        after_clamps(u.output, graph)
        for layer in network.layers
        for u in layer.uses
        if layer.name in fallback.layers or u.data in float_inputs
    }  # from float kernels
    kept = [
        replace(a, feeds=tuple(f for f in a.feeds if f in inputs))
        for a in network.activations
        if a.tensor not in tensors and (inputs.intersection(a.feeds) or (a.fusion and a.tensor not in float_outputs))
    ]
    remaining = replace(network, layers=layers, activations=tuple(kept), products=products)
    return untied(replace(remaining, skipped=(*network.skipped, *skips)))


def _share(candidates: LayerCandidates, curves: NDArray[np.float64], prober: Prober) -> float:
    """Return δ of a layer's weights at full width over the signal's power; measured exactly if first order is large."""
    sums = curves[:, :, -1].sum(axis=1)
    best = int(sums.argmin())
    share = float(sums[best]) / prober.metric.signal
    if share <= _DOUBTFUL:
        return share
    whole = prober.whole_layer(candidates.layer, [candidates.variants[best][-1]], candidates.mean)
    return float(whole[0]) / prober.metric.signal


def _worst(
    shares: Mapping[str, tuple[float, tuple[str, ...]]], pinned: Sequence[str], tolerable: float
) -> dict[str, float]:
    """Return the shares of those that stay in float. shares: (share, names that patterns match) of each."""
    total, worst = sum(share for share, _ in shares.values()), {}
    for key, (share, names) in sorted(shares.items(), key=lambda item: -item[1][0]):
        if total <= tolerable or share <= _HARMLESS:
            break
        if not any(pins(p, names) for p in pinned):
            worst[key] = share
            total -= share
    return worst


def _layer_skips(layer: Layer, share: float, graph: Graph) -> list[Skip]:
    nodes = {n.name: n for n in graph.nodes}
    return [Skip(u.node, nodes[u.node].op_type, _reason(layer.name, share)) for u in layer.uses]


def _activation_skips(
    activation: Activation, share: float | None, graph: Graph, products: Collection[str]
) -> list[Skip]:
    """share: None where float is faster. products: names of nodes that multiply two activations."""
    reason = _slower(activation.tensor) if share is None else _reason(activation.tensor, share)
    nodes = {n.name: n for f in activation.feeds for n in graph.consumers.get(f, [])}
    if nodes:
        return [Skip(n.name, n.op_type, f"{_KEPT[n.name in products]}: {reason}") for n in nodes.values()]
    producer = graph.producer[activation.tensor]
    return [Skip(producer.name, producer.op_type, f"its output stays in float: {reason}")]


def _slower(name: str) -> str:
    return f"{SLOWER}; --pin {as_pattern(name)}={MAX_BITS} quantizes its input anyway"


def _reason(name: str, share: float) -> str:
    if not share:
        return f"an input of {name!r} has no elements on these samples, which leaves nothing to measure; give others"
    pin = f"--pin {as_pattern(name)}={MAX_BITS} quantizes it anyway"
    return f"{name!r} alone, at full width, would reduce the output to {-10 * np.log10(share):.1f} dB; {pin}"
