"""Remove channels that contribute only a constant, and fold them into the biases of their consumers.

A channel whose weights all have 0 bits equals its bias at every position. A layer that reads it can add the same to its
own bias:

    bias of output o += Σ_c value_c Σ_k w[o, c, k]      over the removed input channels c

Where biases are INT32, this is done in integers, (q_c - zero point) Σ_k w[o, c, k], and so without rounding. A channel
that no kept output depends on is removed, too, constant or not: removing outputs leaves such inputs. The result is
smaller and faster, and computes the same.

These channels are kept, with a reason: those of graph outputs, those read by an unsupported operator, those coupled to
one that varies where a layer reads it, those that a layer pads with another value, and the last of each tensor.
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
    """The channels to remove, and why others are kept. Layers go by node name, channels by index in the model.

    outputs, inputs: layer -> its output channels, and its input columns, to remove. kept: layer -> output channels
    without weights that are kept, each with the reason. cuts: tensor -> its kept channels. added: layer -> what is
    added to its bias, [outputs], int64 where the bias is INT32, else float64.
    """

    outputs: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[tuple[int, str], ...]]
    cuts: Mapping[str, Cut]
    added: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class RemoveChannels(Pass):
    """Remove the channels that `removable` found in the same model; a second run would find no more.

    Assumes a model as InsertQDQ leaves it: batch normalization folded, nodes named. The outputs stay the same: bit for
    bit where integers are added, up to float rounding elsewhere.
    """

    removal: Removal

    def __call__(self, model: ModelProto) -> ModelProto:
        return surgeon.edit(model, lambda graph: slice_channels(graph, self.removal.cuts, self.removal.added))


def removable(model: ModelProto, multiple: int = 1, depthwise: int = 1) -> Removal:
    """Find the channels that RemoveChannels can remove from `model` without changing what it computes.

    multiple: a channel count that is a multiple of this stays one, as kernels are slow on other counts. depthwise: the
    same for the channels of depthwise layers.
    """
    analysis = ConstantChannels(model)
    removed, reasons = _select(analysis, multiple, depthwise)
    stays = {name: ~_among(analysis.coupling.roots(x.slots), removed) for name, x in analysis.channels.items()}
    outputs: dict[str, tuple[int, ...]] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    kept: dict[str, tuple[tuple[int, str], ...]] = {}
    added: dict[str, NDArray[Any]] = {}
    for name, layer in analysis.layers.items():
        output, data = layer.node.output[0], analysis.data_of(layer)
        empty = ~layer.used.any(axis=-1).reshape(-1)
        roots = analysis.coupling.roots(analysis.channels[output].slots).tolist()
        outputs[name] = _indices(~stays[output])
        kept[name] = tuple((c, reasons[roots[c]]) for c in _indices(empty & stays[output]))
        if data is not None and not layer.depthwise:
            columns = ~stays[layer.node.input[0]]
            inputs[name] = _indices(columns)
            added[name] = layer.summed(analysis.summands(layer, columns))
    return Removal(
        {name: x for name, x in outputs.items() if x},
        {name: x for name, x in inputs.items() if x},
        {name: x for name, x in kept.items() if x},
        {name: Cut(mask, analysis.channels[name].trailing) for name, mask in stays.items() if not mask.all()},
        {name: x for name, x in added.items() if x.any()},
    )


def _select(analysis: ConstantChannels, multiple: int, depthwise: int) -> tuple[set[int], dict[int, str]]:
    """The slots to remove, and why others are kept."""
    roots = {name: analysis.coupling.roots(x.slots) for name, x in analysis.channels.items()}
    tensors = list({x.tobytes(): set(x.tolist()) for x in roots.values()}.values())
    apart = [set(roots[x.node.output[0]].tolist()) for x in analysis.layers.values() if x.depthwise]
    steps = [_step(len(slots), (depthwise, multiple) if slots in apart else (multiple,)) for slots in tensors]
    fixed = analysis.coupling.fixed()
    while True:
        removed, reasons = _removable_slots(analysis, roots, tensors, fixed)
        misaligned = [(s, n) for s, n in zip(tensors, steps, strict=True) if len(s - removed) % n]
        if not misaligned:
            return removed, reasons
        for slots, step in misaligned:
            restored = sorted(slots & removed)[-(-len(slots - removed) % step) :]
            fixed |= dict.fromkeys(
                restored, f"without it the channel count of its tensor would not be a multiple of {step}"
            )


def _step(channels: int, multiples: Sequence[int]) -> int:
    """Return the first of `multiples` that the channel count is one of, and has to stay one of; 1 for none."""
    return next((n for n in multiples if channels % n == 0), 1)


def _removable_slots(
    analysis: ConstantChannels,
    roots: Mapping[str, NDArray[np.int64]],
    tensors: Sequence[set[int]],
    fixed: dict[int, str],
) -> tuple[set[int], dict[int, str]]:
    """The slots that can be removed if those in `fixed` are kept, and why others are kept.

    Iterates, as removed outputs leave inputs unused, which can then be removed, too.
    """
    obstacles = [(x, list(_obstacles(analysis, x))) for x in analysis.layers.values() if not x.depthwise]
    removed: set[int] = set()
    while True:
        reasons = dict(fixed)
        for layer, masks in obstacles:
            rows = ~_among(roots[layer.node.output[0]], removed).reshape(layer.blocks.shape[:2])
            needed = (layer.used & rows[:, :, None]).any(axis=1).reshape(-1)
            for mask, reason in masks:
                for slot in roots[layer.node.input[0]][mask & needed].tolist():
                    reasons.setdefault(slot, reason)
        new = set().union(*tensors) - removed - reasons.keys()
        for slots in tensors:
            if not slots - removed - new:
                last = min(slots & new)
                new.remove(last)
                fixed[last] = _LAST
        if not new:
            return removed, reasons | fixed
        removed |= new


def _obstacles(analysis: ConstantChannels, layer: StoredLayer) -> Iterator[tuple[Mask, str]]:
    """Yield masks, [inputs], of the inputs that `layer` needs while an output depends on them, with the reason."""
    data = analysis.data_of(layer)
    if data is None:
        return
    at_border, nonzero = uneven(layer, data), data.values != 0
    yield ~data.constant, f"it varies where {layer.label} reads it"
    yield at_border, f"it is not zero, and {layer.label} does not add it equally at all positions"
    if layer.node.op_type == "MatMul" and layer.adder is None:
        yield nonzero, f"it is not zero, and no Add of a constant after {layer.label} could absorb it"
    if layer.codes and layer.reach(analysis.summands(layer, ~at_border)) >= _INT32:
        yield nonzero, f"the bias of {layer.label} would not fit into INT32"


def _among(roots: NDArray[np.int64], chosen: set[int]) -> Mask:
    return np.isin(roots, list(chosen))


def _indices(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())
