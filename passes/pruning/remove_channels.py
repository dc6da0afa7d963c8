"""Channels that contribute nothing but a constant, folded into the biases behind them and removed.

A channel whose weights all have 0 bits is its bias at every position. What reads it gets the same from its own bias:

    bias of output o += Σ_c value_c Σ_k w[o, c, k]      over the removed input channels c

in integers, and so without rounding, where biases are INT32: (q_c - zero point) Σ_k w[o, c, k]. A channel that no kept
output depends on goes, too, constant or not: removed outputs leave such inputs behind. The result is smaller and faster
and computes the same.

Kept, with a reason, are channels of outputs of the network, those that an operator not known here reads, those tied to
one that varies where a layer reads them, those that a layer pads with another value, and the last of each tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.pruning.constant_channels import ConstantChannels, Mask, uneven
from rdoq_onnx.passes.pruning.slice_channels import Cut, slice_channels
from rdoq_onnx.passes.pruning.stored_layers import StoredLayer

_INT32 = 2**31
_LAST = "it is the last channel of its tensor"


@dataclass(frozen=True)
class Removal:
    """What can go, and why other channels stay. Layers are named by their node, channels numbered as in the model.

    outputs, inputs: layer -> its output channels, and its input columns, that go. kept: layer -> output channels
    without weights that stay, each with the reason. cuts: tensor -> its channels that stay. added: layer -> what its
    bias takes up, [outputs], int64 where the bias is INT32, else float64.
    """

    outputs: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[tuple[int, str], ...]]
    cuts: Mapping[str, Cut]
    added: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove what `removable` found in the same model. Nothing is left that a second round could remove.

    Assumes a model as InsertQDQ leaves it: batch normalization folded, nodes named. The outputs stay the same: bit for
    bit where integers are added, up to the rounding of floats elsewhere.
    """

    removal: Removal

    def __call__(self, model: ModelProto) -> ModelProto:
        return surgeon.edit(model, lambda graph: slice_channels(graph, self.removal.cuts, self.removal.added))


def removable(model: ModelProto, multiple: int = 1) -> Removal:
    """The channels that RemoveChannels can remove from `model` without changing what it computes.

    multiple: a tensor of a multiple of so many channels is left one, as kernels are slow on others.
    """
    found = ConstantChannels(model)
    gone, reasons = _select(found, multiple)
    stays = {name: ~_among(found.ties.roots(x.slots), gone) for name, x in found.channels.items()}
    outputs: dict[str, tuple[int, ...]] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    kept: dict[str, tuple[tuple[int, str], ...]] = {}
    added: dict[str, NDArray[Any]] = {}
    for name, layer in found.layers.items():
        output, data = layer.node.output[0], found.data_of(layer)
        empty = ~layer.used.any(axis=-1).reshape(-1)
        roots = found.ties.roots(found.channels[output].slots).tolist()
        outputs[name] = _indices(~stays[output])
        kept[name] = tuple((c, reasons[roots[c]]) for c in _indices(empty & stays[output]))
        if data is not None and not layer.depthwise:
            columns = ~stays[layer.node.input[0]]
            inputs[name] = _indices(columns)
            added[name] = layer.summed(found.summands(layer, columns))
    return Removal(
        {name: x for name, x in outputs.items() if x},
        {name: x for name, x in inputs.items() if x},
        {name: x for name, x in kept.items() if x},
        {name: Cut(mask, found.channels[name].behind) for name, mask in stays.items() if not mask.all()},
        {name: x for name, x in added.items() if x.any()},
    )


def _select(found: ConstantChannels, multiple: int) -> tuple[set[int], dict[int, str]]:
    """The slots that go, and why others stay."""
    roots = {name: found.ties.roots(x.slots) for name, x in found.channels.items()}
    tensors = list({x.tobytes(): set(x.tolist()) for x in roots.values()}.values())
    fixed = found.ties.fixed()
    while True:
        gone, reasons = _possible(found, roots, tensors, fixed)
        uneven_tensors = [s for s in tensors if len(s) % multiple == 0 and len(s - gone) % multiple]
        if not uneven_tensors:
            return gone, reasons
        for slots in uneven_tensors:
            some = sorted(slots & gone)[-(-len(slots - gone) % multiple) :]
            fixed |= dict.fromkeys(some, f"without it the channels of its tensor are no multiple of {multiple}")


def _possible(
    found: ConstantChannels, roots: Mapping[str, NDArray[np.int64]], tensors: Sequence[set[int]], fixed: dict[int, str]
) -> tuple[set[int], dict[int, str]]:
    """The slots that go if those `fixed` stay. Outputs that go leave inputs unused, so more go in the next round."""
    obstacles = [(x, list(_obstacles(found, x))) for x in found.layers.values() if not x.depthwise]
    gone: set[int] = set()
    while True:
        reasons = dict(fixed)
        for layer, masks in obstacles:
            rows = ~_among(roots[layer.node.output[0]], gone).reshape(layer.blocks.shape[:2])
            needed = (layer.used & rows[:, :, None]).any(axis=1).reshape(-1)
            for mask, reason in masks:
                for slot in roots[layer.node.input[0]][mask & needed].tolist():
                    reasons.setdefault(slot, reason)
        new = set().union(*tensors) - gone - reasons.keys()
        for slots in tensors:
            if not slots - gone - new:
                last = min(slots & new)
                new.remove(last)
                fixed[last] = _LAST
        if not new:
            return gone, reasons | fixed
        gone |= new


def _obstacles(found: ConstantChannels, layer: StoredLayer) -> Iterator[tuple[Mask, str]]:
    """Inputs, [inputs], that `layer` cannot do without as long as an output depends on them, each with the reason."""
    data = found.data_of(layer)
    if data is None:
        return
    at_border, nonzero = uneven(layer, data), data.values != 0
    yield ~data.constant, f"it varies where {layer.label} reads it"
    yield at_border, f"it is not zero, and {layer.label} does not add it to all positions alike"
    if layer.node.op_type == "MatMul" and layer.adder is None:
        yield nonzero, f"it is not zero, and no Add of a constant behind {layer.label} could take it up"
    if layer.codes and layer.reach(found.summands(layer, ~at_border)) >= _INT32:
        yield nonzero, f"the bias of {layer.label} would not fit into INT32"


def _among(roots: NDArray[np.int64], chosen: set[int]) -> Mask:
    return np.isin(roots, list(chosen))


def _indices(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())
