"""Cross-layer equalization: even out channel ranges without changing the network's function.

All channels of an activation share one scale, so the channel of widest range sets the step for all. Through a
positively homogeneous function, f(r·x) = r·f(x), a channel's scale can move from the layer that produces it to the
layers that consume it (Nagel et al., ICCV 2019):

    W₁ row c · r_c,  b₁ c · r_c,  ceiling c · r_c,  W₂ column c / r_c

Channels that an Add, a Pad or a Concat combines must share one r: they form a *slot*. Tensors that share slots form a
*component*. A slot is free if all its producers and consumers are layers. The columns of weights on a grid
(model/grid.py) keep their scale, which rounds them without loss.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.grid import Grid
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.channel_slots import Chains, SlotUnion, find_chains
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.equalize import Equalize
from rdoq_onnx.system.runtime import Runtime

_MAX_FACTOR = 64.0  # largest change of a channel's scale
_NARROW = 5  # weight bits up to which they count as narrow
_QUIET = 1e-3  # channels below this share of the widest range stay as they are: they may be dead on these samples

Float = NDArray[np.float64]


def typical_widths(config: Config) -> tuple[int, int]:
    """Return the widths of activations and weights that channel scales are chosen for: narrow ones or wide ones.

    All budgets of either kind share one measurement.
    """
    weights = config.weight_bits
    narrow = weights is not None and config.size is None and weights <= _NARROW
    return (4 if config.narrow else 8), (4 if narrow else 7)


def exponent_for(config: Config) -> float:
    """Return the exponent for ranges evened out at the weights' expense; 0 for wide activations, which gain less."""
    return 0.35 if config.narrow else 0.0


def equalize(network: Network, config: Config, samples: Samples, runtime: Runtime) -> Network:
    """Even out the channel ranges of `network` as measured on `samples`; its outputs stay the same."""
    if not network.activations:
        return network
    ranges = channel_ranges(network, samples, runtime)
    chains = find_chains(network, {name: r.shape for name, r in ranges.items()})
    factors = slot_factors(chains, network, ranges, exponent_for(config))
    scale = np.vectorize(lambda slot: factors.get(int(slot), 1.0), otypes=[float])
    changed = [
        {name: scale(slots) for name, slots in nodes.items() if any(s in factors for s in slots.ravel().tolist())}
        for nodes in (chains.outputs, chains.inputs, chains.clips)
    ]
    return analyse(run_passes([Equalize(*changed)], network.model), config.selection) if any(changed) else network


def channel_ranges(network: Network, samples: Samples, runtime: Runtime) -> dict[str, Float]:
    """Return each channel's peak magnitude per sample, averaged over samples, for tensors that may be part of a chain.

    Arrays are [C, 1, ...] and broadcast to the tensor. Tensors whose axis 0 does not run over the samples, or
    whose axis 1 has a size of its own in each, are omitted.
    """
    graph = Graph(network.model)
    tensors = [n.output[0] for n in graph.nodes if n.op_type in SlotUnion.ALL or n.op_type in ("Conv", "Gemm")]
    if not tensors:
        return {}
    session = runtime.session(with_outputs(network.model, list(dict.fromkeys(tensors))), "all")
    sums: dict[str, Float] = {}
    varying: set[str] = set()
    for count, feeds in samples.counted_batches(1):
        for name, value in zip(session.outputs, session.run(feeds), strict=True):
            if value.ndim >= 2 and value.size and value.dtype.kind == "f" and len(value) == count:
                peaks = np.abs(value).max(axis=tuple(range(2, value.ndim)), keepdims=True)
                peaks = peaks.astype(np.float64).max(axis=0)
                if name in sums and sums[name].shape != peaks.shape:
                    varying.add(name)
                else:
                    sums[name] = sums.get(name, 0.0) + peaks
    return {name: total / len(samples) for name, total in sums.items() if name not in varying}


def slot_factors(chains: Chains, network: Network, ranges: Mapping[str, Float], exponent: float) -> dict[int, float]:
    """Return r of each free slot, which raises its range towards the widest of its component by `exponent`, 0 to 1.

    Only the ranges of tensors that will be quantized count. If all consumers of a component are depthwise
    convolutions, both sides have one scale per channel, so ranges are evened out in full at no loss.
    """
    layers = {x.uses[0].node: x for x in network.layers}
    spread: dict[int, float] = {}
    quantized = {t for a in network.activations for t in (a.tensor, *a.parts)}
    for tensor, slots in ((t, s) for t, s in chains.slots.items() if t in quantized):
        for slot, value in zip(slots.tolist(), ranges[tensor].ravel().tolist(), strict=True):
            spread[slot] = max(spread.get(slot, 0.0), value)
    top: dict[int, float] = {}
    for slot, value in spread.items():
        group = chains.component[slot]
        top[group] = max(top.get(group, 0.0), value)
    costly = {
        chains.component[int(s)] for name, slots in chains.inputs.items() if not _depthwise(layers[name]) for s in slots
    }
    kept = {
        int(s)
        for name, slots in chains.inputs.items()
        if not _depthwise(layers[name]) and Grid.of(network.rows(layers[name])).whole
        for s in slots
    }
    factors = {}
    for slot, value in spread.items():
        group = chains.component[slot]
        power = exponent if group in costly else 1.0
        if slot not in chains.fixed and slot not in kept and power and value > _QUIET * top[group]:
            factors[slot] = min((top[group] / value) ** power, _MAX_FACTOR)
    return factors


def _depthwise(layer: Layer) -> bool:
    return layer.linear.op_type == "Conv" and layer.linear.shape[1] == 1 and layer.linear.group > 1
