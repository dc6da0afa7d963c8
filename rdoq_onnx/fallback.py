"""Activations that a quantizer may ruin: measured exactly, and left in float if no quantizer of full width holds them.

First order misjudges large perturbations both ways. Behind a logarithm it promises a hundred times what happens; behind
a threshold, a hundredth. And some tensors, of few wide channels and many narrow ones, are beyond any quantizer that has
one scale for all: one layer in float is then a better file than one that a single tensor has spoilt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rdoq_onnx.analysis import Activation, Network
from rdoq_onnx.candidates import Candidates
from rdoq_onnx.config import Config
from rdoq_onnx.graph import Graph
from rdoq_onnx.patterns import as_pattern, matches
from rdoq_onnx.probe import Prober
from rdoq_onnx.progress import Advance
from rdoq_onnx.quantizer import Affine
from rdoq_onnx.taylor import Distortions
from rdoq_onnx.unquantized import Skip

SAMPLES = 8  # of exact measurements
# δ at full width, as a share of the signal's power:
_DOUBTFUL = 1e-3  # of one activation, 30 dB by itself, from which first order is checked
_BEARABLE = 5e-3  # of all activations, 23 dB; beyond it the worst stay in float, but for
_HARMLESS = 3e-4  # 35 dB by itself

Tables = tuple[Mapping[int, tuple[Affine, ...]], ...]


def doubtful(network: Network, measured: Distortions, power: float) -> list[int]:
    """Indices of the activations whose first-order δ at full width is large; power: that of the signal."""
    return [
        k
        for k, (activation, values) in enumerate(zip(network.activations, measured.activations, strict=True))
        if values[max(values)].min() > _DOUBTFUL * power and activation.tensor not in measured.missing
    ]


def checked(
    network: Network, candidates: Candidates, coarse: Tables, measured: Distortions, doubts: Sequence[int],
    prober: Prober, advance: Advance,
) -> tuple[Candidates, Distortions]:  # fmt: skip
    """`candidates` and `measured` with exact values of the activations `doubts`; `advance(1)` after each.

    For those the best quantizer of each width is kept, and at full width all that there are; coarse: the whole range of
    clips, before it was refined around the first order's best.
    """
    tables, values = list(candidates.activations), list(measured.activations)
    for k in doubts:
        widest = max(tables[k])
        tried: dict[int, tuple[Affine, ...]] = {
            b: (several[int(np.argmin(values[k][b]))],) for b, several in tables[k].items()
        }
        tried[widest] = tuple(dict.fromkeys([*tables[k][widest], *coarse[k][widest]]))
        flat = prober.activation(network.activations[k], [q for several in tried.values() for q in several])
        parts = np.split(flat, np.cumsum([len(several) for several in tried.values()])[:-1])
        tables[k], values[k] = tried, dict(zip(tried, parts, strict=True))
        advance(1)
    return replace(candidates, activations=tuple(tables)), replace(measured, activations=tuple(values))


def unheld(network: Network, measured: Distortions, config: Config, power: float) -> dict[str, float]:
    """Tensors that no quantizer of full width holds, with the least δ of one over the signal's `power`.

    The worst, until the rest are bearable together; without those that `--pin` names.
    """
    least = {
        a.tensor: float(values[max(values)].min()) / power
        for a, values in zip(network.activations, measured.activations, strict=True)
    }
    pinned = [pattern for pattern, _ in config.pins]
    total, found = sum(least.values()), {}
    for tensor, share in sorted(least.items(), key=lambda item: -item[1]):
        if total <= _BEARABLE or share <= _HARMLESS:
            break
        if not any(matches(p, (tensor,)) for p in pinned):
            found[tensor] = share
            total -= share
    return found


def in_float(network: Network, tensors: Mapping[str, float]) -> Network:
    """`network` without quantizers of `tensors`, and with the reason beside each node that it concerns."""
    if not tensors:
        return network
    graph = Graph(network.model)
    left = tuple(s for a in network.activations if a.tensor in tensors for s in _skips(a, tensors[a.tensor], graph))
    kept = tuple(a for a in network.activations if a.tensor not in tensors)
    return replace(network, activations=kept, skipped=(*network.skipped, *left))


def _skips(activation: Activation, share: float, graph: Graph) -> list[Skip]:
    ruin = f"8 bits of {activation.tensor!r} alone would take the output to {-10 * np.log10(share):.1f} dB"
    pin = f"; --pin {as_pattern(activation.tensor)}=8 quantizes it nevertheless"
    nodes = {n.name: n for f in activation.feeds for n in graph.consumers.get(f, [])}
    if nodes:
        return [Skip(n.name, n.op_type, f"its weights alone are quantized: {ruin}{pin}") for n in nodes.values()]
    maker = graph.producer[activation.tensor]
    return [Skip(maker.name, maker.op_type, f"its output stays in float: {ruin}{pin}")]
