"""What a quantizer may ruin: measured exactly, and left in float if no quantizer of full width holds it.

First order misjudges large perturbations both ways. Behind a logarithm it promises a hundred times what happens; behind
a threshold, a hundredth. And some tensors, of few wide channels and many narrow ones, are beyond any quantizer that has
one scale for all: one layer in float is then a better file than one that a single tensor has spoilt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network, layer_names
from rdoq_onnx.analysis.patterns import as_pattern, channel_range, matches
from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates, widest
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.curves.measurement import Unheld
from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.model.graph import Graph, after_clamps
from rdoq_onnx.model.layers import Activation, Layer
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.probe import Prober, exact_activation
from rdoq_onnx.system.progress import Advance

SAMPLES = 8  # of exact measurements
# δ at full width, as a share of the signal's power:
_DOUBTFUL = 1e-3  # of one activation or layer, 30 dB by itself, from which first order is checked
_BEARABLE = 5e-3  # of all activations, or of all layers, 23 dB; beyond it the worst stay in float, but for
_HARMLESS = 3e-4  # 35 dB by itself


def doubtful(network: Network, measured: Distortions, power: float) -> list[int]:
    """Indices of the activations whose first-order δ at full width is large; power: that of the signal."""
    return [
        k
        for k, (activation, values) in enumerate(zip(network.activations, measured.activations, strict=True))
        if values[max(values)].min() > _DOUBTFUL * power and activation.tensor not in measured.missing
    ]


def checked(
    candidates: Candidates, measured: Distortions, doubts: Mapping[int, Sequence[Affine]], prober: Prober,
    advance: Advance,
) -> tuple[Candidates, Distortions]:  # fmt: skip
    """`candidates` and `measured` with exact values of the activations `doubts`; `advance(1)` after each.

    For those the best quantizer of each width is kept, and at full width all that there are: doubts holds, by the
    activation's index, the whole range of clips, before it was refined around the first order's best.
    """
    tables, values = list(candidates.activations), list(measured.activations)
    for k, clips in doubts.items():
        table = tables[k].table
        tried: dict[int, tuple[Affine, ...]] = {
            b: (several[int(np.argmin(values[k][b]))],) for b, several in table.items()
        }
        tried[max(table)] = tuple(dict.fromkeys([*table[max(table)], *clips]))
        tables[k] = replace(tables[k], table=tried)
        values[k] = exact_activation(prober, tables[k])
        advance(1)
    return replace(candidates, activations=tuple(tables)), replace(measured, activations=tuple(values))


def unheld(network: Network, candidates: Candidates, measured: Distortions, config: Config, prober: Prober) -> Unheld:
    """The worst activations and layers at full width, until the rest of either are bearable; without those pinned.

    No layers where `--widths` ends before full width. Raises ModelError if no layer is left.
    """
    pinned = [pattern for pattern, _ in config.pins]
    activations = {
        a.tensor: (float(values[max(values)].min()) / prober.metric.power, a.names)
        for a, values in zip(network.activations, measured.activations, strict=True)
    }
    layers = {
        each.layer.name: (_share(each, found, prober), layer_names(each.layer))
        for each, found in zip(candidates.layers, measured.weights, strict=True)
        if candidates.widths[-1] == widest(network)
    }
    found = Unheld(*(_worst(shares, pinned) for shares in (activations, layers)))
    if len(found.layers) == len(network.layers):
        name, share = next(iter(found.layers.items()))
        raise ModelError(f"no layer can be quantized: {_ruin(name, share)}")
    return found


def in_float(network: Network, left: Unheld) -> Network:
    """`network` without what is `left` in float, and with the reason beside each node that it concerns."""
    if not left.tensors and not left.layers:
        return network
    graph = Graph(network.model)
    lost = [layer for layer in network.layers if layer.name in left.layers]
    skips = [s for layer in lost for s in _layer_skips(layer, left.layers[layer.name], graph)]
    told = {s.node for s in skips}
    skips += [s for a in network.activations if a.tensor in left.tensors
              for s in _activation_skips(a, left.tensors[a.tensor], graph) if s.node not in told]  # fmt: skip
    layers = tuple(layer for layer in network.layers if layer.name not in left.layers)
    read = {u.data for layer in layers for u in layer.uses}
    unread = {f for a in network.activations if a.tensor in left.tensors for f in a.feeds}
    idle = {after_clamps(u.output, graph) for layer in network.layers for u in layer.uses
            if layer.name in left.layers or u.data in unread}  # no integer kernel makes them
    kept = [
        replace(a, feeds=tuple(f for f in a.feeds if f in read))
        for a in network.activations
        if a.tensor not in left.tensors and (read.intersection(a.feeds) or (a.fusion and a.tensor not in idle))
    ]
    return replace(network, layers=layers, activations=tuple(kept), skipped=(*network.skipped, *skips))


def _share(candidates: LayerCandidates, found: NDArray[np.float64], prober: Prober) -> float:
    """δ of all weights of a layer at full width over the signal's power; exact where the first order is large."""
    sums = found[:, :, -1].sum(axis=1)
    best = int(sums.argmin())
    share = float(sums[best]) / prober.metric.power
    if share <= _DOUBTFUL:
        return share
    whole = prober.whole_layer(candidates.layer, [candidates.variants[best][-1]], candidates.mean)
    return float(whole[0]) / prober.metric.power


def _worst(shares: Mapping[str, tuple[float, tuple[str, ...]]], pinned: Sequence[str]) -> dict[str, float]:
    """Of (share, names that patterns know it by): those that must go."""
    total, found = sum(share for share, _ in shares.values()), {}
    for key, (share, names) in sorted(shares.items(), key=lambda item: -item[1][0]):
        if total <= _BEARABLE or share <= _HARMLESS:
            break
        if not any(matches(channel_range(p)[0], names) for p in pinned):
            found[key] = share
            total -= share
    return found


def _layer_skips(layer: Layer, share: float, graph: Graph) -> list[Skip]:
    nodes = {n.name: n for n in graph.nodes}
    return [Skip(u.node, nodes[u.node].op_type, _ruin(layer.name, share)) for u in layer.uses]


def _activation_skips(activation: Activation, share: float, graph: Graph) -> list[Skip]:
    ruin = _ruin(activation.tensor, share)
    nodes = {n.name: n for f in activation.feeds for n in graph.consumers.get(f, [])}
    if nodes:
        return [Skip(n.name, n.op_type, f"its weights alone are quantized: {ruin}") for n in nodes.values()]
    maker = graph.producer[activation.tensor]
    return [Skip(maker.name, maker.op_type, f"its output stays in float: {ruin}")]


def _ruin(name: str, share: float) -> str:
    pin = f"--pin {as_pattern(name)}={MAX_BITS} quantizes it nevertheless"
    return f"{name!r} at full width alone would take the output to {-10 * np.log10(share):.1f} dB; {pin}"
