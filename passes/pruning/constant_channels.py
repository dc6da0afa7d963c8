"""Which channels are constant, and which channels can only be removed together.

A weight row of zeros makes its output channel constant: the bias. From there constants are followed through the graph,
computed as runtimes compute them, and so are slots: channels that only go together, as where an Add brings two tensors
together, are tied.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.protos import captured
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.model.union_find import UnionFind
from rdoq_onnx.passes.pruning.channel_rules import BROADCASTING, Channels, Shapes, follow
from rdoq_onnx.passes.pruning.stored_layers import StoredLayer, read_layer

_SMALL = 1024  # elements of the tensors that shape inference may look into

Slots = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Ties(UnionFind):
    """Sets of slots that are removed together, with the reasons for which some have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[int, str] = {}

    def fix(self, slots: Slots, reason: str) -> None:
        for slot in slots.tolist():
            self.reasons.setdefault(slot, reason)

    def fixed(self) -> dict[int, str]:
        """The first reason of each root that has one."""
        found: dict[int, str] = {}
        for slot, reason in self.reasons.items():
            found.setdefault(self.find(slot), reason)
        return found


class ConstantChannels:
    """What is known of the channels of `model`: by tensor, and the layers by the name of their node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = Graph(model)
        self._shapes = _shapes(model)
        self._users: dict[str, StoredLayer] = {}
        self.channels: dict[str, Channels] = {}
        self.layers: dict[str, StoredLayer] = {}
        self.ties = Ties()
        for node in self._graph.nodes:
            found = self._follow(node) if node.domain in ("", "ai.onnx") and not any(node.output[1:]) else None
            if found is not None:
                finite = np.isfinite(found.values.astype(np.float64))
                self.channels[node.output[0]] = replace(found, constant=found.constant & finite)
            else:
                self._fix(node.input, f"{node.op_type} {node.name} reads it")
            self._fix(captured(node), f"a body of {node.op_type} {node.name} reads it")
        self._fix(self._graph.outputs, "it is an output of the network")

    def data_of(self, layer: StoredLayer) -> Channels | None:
        """The channels that `layer` reads, if they are known."""
        found = self.channels.get(layer.node.input[0])
        fits = found is not None and found.slots.size == layer.inputs and found.behind == layer.spatial
        return found if fits else None

    def summands(self, layer: StoredLayer, which: Mask) -> NDArray[Any]:
        """The constants among the inputs in `which`, [inputs], as `layer.summed` takes them; 0 for all else."""
        data = self.data_of(layer)
        if data is None:
            return np.zeros(layer.inputs)
        if layer.codes:
            integers = self.channels[layer.codes.tensor].values.astype(np.int64)
            return np.where(which & data.constant, integers - layer.codes.zero_point, 0)
        return np.where(which & data.constant, data.values, 0).astype(np.float64)

    def _fix(self, tensors: Iterable[str], reason: str) -> None:
        for name in tensors:
            if name in self.channels:
                self.ties.fix(self.channels[name].slots, reason)

    def _follow(self, node: onnx.NodeProto) -> Channels | None:
        """The channels of the output of `node`; None if what it does with those of its inputs is not known."""
        if node.op_type in LAYER_TYPES:
            layer = read_layer(node, self._graph)
            return None if layer is None else self._layer(layer)
        inputs = {name: self.channels[name] for name in node.input if name in self.channels}
        found = follow(node, inputs, self._graph, self._shapes) if inputs else None
        if found is not None and node.op_type in BROADCASTING:
            for other in inputs.values():
                self.ties.unite_all(found.slots, other.slots)
        return found

    def _layer(self, layer: StoredLayer) -> Channels:
        self.layers[layer.node.name] = layer
        data = self.data_of(layer)
        if data is None:
            self._fix(layer.node.input[:1], f"{layer.label} reads it in a form not known here")
        slots = self.ties.new(layer.outputs)
        self._tie_groups(layer, data, slots)
        self._tie_users(layer, data, slots)
        even = np.zeros(layer.inputs, bool) if data is None else data.constant & ~uneven(layer, data)
        varying = (layer.used & ~even.reshape(layer.blocks.shape[0], 1, -1)).any(axis=-1).reshape(-1)
        values = layer.values(layer.summed(self.summands(layer, even)))
        return Channels(slots, values, ~varying, layer.spatial)

    def _tie_groups(self, layer: StoredLayer, data: Channels | None, slots: Slots) -> None:
        groups = layer.blocks.shape[0]
        if layer.depthwise and data is not None:
            self.ties.unite_all(slots, data.slots)
        elif groups > 1:
            for edge in [slots] if data is None else [slots, data.slots]:
                self.ties.fix(edge, f"{layer.label} has {groups} groups")

    def _tie_users(self, layer: StoredLayer, data: Channels | None, slots: Slots) -> None:
        """Layers that share a weight lose the same channels, on both sides."""
        other = self._users.setdefault(layer.node.input[1], layer)
        if other is layer:
            return
        sides = [(slots, self.channels[other.node.output[0]].slots)]
        theirs = self.data_of(other)
        if data is not None and theirs is not None:
            sides.append((data.slots, theirs.slots))
        alike = _layout(layer) == _layout(other) and (data is None) == (theirs is None)
        for a, b in sides:
            if alike:
                self.ties.unite_all(a, b)
        for edge in [] if alike else [x.slots for x in (data, theirs) if x is not None] + list(sides[0]):
            self.ties.fix(edge, f"{layer.label} and {other.label} share a weight but not its form")


def uneven(layer: StoredLayer, data: Channels) -> Mask:
    """Which inputs, [inputs], would, if constant, not add the same to all positions of the outputs."""
    return np.asarray(layer.padded & (data.values != 0))


def _layout(layer: StoredLayer) -> tuple[object, ...]:
    return layer.node.op_type, layer.blocks.shape, attribute(layer.node, "transB", 0)


def _shapes(model: onnx.ModelProto) -> Shapes:
    """Shapes as far as they can be inferred, 0 for a size that cannot."""
    graph = onnx.shape_inference.infer_shapes(weights_as_inputs(model, larger_than=_SMALL)).graph
    return {
        i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in (*graph.value_info, *graph.input, *graph.output)
    }
