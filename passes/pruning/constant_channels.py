"""Find constant channels, and groups of coupled channels, which can only be removed together.

A zero weight row makes its output channel constant: it equals the bias. From there, constants are propagated through
the graph, computed as runtimes compute them. So are slots, the ids of channels; slots are coupled where an operator
such as Add combines the channels of several tensors.
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
from rdoq_onnx.passes.pruning.channel_rules import BROADCASTING, Channels, Shapes, propagate
from rdoq_onnx.passes.pruning.stored_layers import StoredLayer, read_layer

_SMALL = 1024  # elements: shape inference sees no larger constants

Slots = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Coupling(UnionFind):
    """Sets of coupled slots, with the reasons why some must be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[int, str] = {}

    def fix(self, slots: Slots, reason: str) -> None:
        for slot in slots.tolist():
            self.reasons.setdefault(slot, reason)

    def fixed(self) -> dict[int, str]:
        """The first reason of each root that has one."""
        reasons: dict[int, str] = {}
        for slot, reason in self.reasons.items():
            reasons.setdefault(self.find(slot), reason)
        return reasons


class ConstantChannels:
    """The known channels of `model` by tensor, its layers by node name, and the coupling of slots."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = Graph(model)
        self._shapes = _shapes(model)
        self._users: dict[str, StoredLayer] = {}
        self.channels: dict[str, Channels] = {}
        self.layers: dict[str, StoredLayer] = {}
        self.coupling = Coupling()
        for node in self._graph.nodes:
            output = self._propagate(node) if node.domain in ("", "ai.onnx") and not any(node.output[1:]) else None
            if output is not None:
                finite = np.isfinite(output.values.astype(np.float64))
                self.channels[node.output[0]] = replace(output, constant=output.constant & finite)
            else:
                self._fix(node.input, f"{node.op_type} {node.name} reads it")
            self._fix(captured(node), f"a body of {node.op_type} {node.name} reads it")
        self._fix(self._graph.outputs, "it is an output of the network")

    def data_of(self, layer: StoredLayer) -> Channels | None:
        """The channels that `layer` reads, if known."""
        data = self.channels.get(layer.node.input[0])
        fits = data is not None and data.slots.size == layer.inputs and data.trailing == layer.spatial
        return data if fits else None

    def summands(self, layer: StoredLayer, which: Mask) -> NDArray[Any]:
        """The constant values of the inputs in `which`, [inputs], as `layer.summed` takes them; 0 elsewhere."""
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
                self.coupling.fix(self.channels[name].slots, reason)

    def _propagate(self, node: onnx.NodeProto) -> Channels | None:
        """The channels of the output of `node`; None if no rule covers it."""
        if node.op_type in LAYER_TYPES:
            layer = read_layer(node, self._graph)
            return None if layer is None else self._layer(layer)
        inputs = {name: self.channels[name] for name in node.input if name in self.channels}
        output = propagate(node, inputs, self._graph, self._shapes) if inputs else None
        if output is not None and node.op_type in BROADCASTING:
            for other in inputs.values():
                self.coupling.unite_all(output.slots, other.slots)
        return output

    def _layer(self, layer: StoredLayer) -> Channels:
        self.layers[layer.node.name] = layer
        data = self.data_of(layer)
        if data is None:
            self._fix(layer.node.input[:1], f"{layer.label} reads it in an unsupported form")
        slots = self.coupling.new(layer.outputs)
        self._couple_groups(layer, data, slots)
        self._couple_users(layer, data, slots)
        even = np.zeros(layer.inputs, bool) if data is None else data.constant & ~uneven(layer, data)
        varying = (layer.used & ~even.reshape(layer.blocks.shape[0], 1, -1)).any(axis=-1).reshape(-1)
        values = layer.values(layer.summed(self.summands(layer, even)))
        return Channels(slots, values, ~varying, layer.spatial)

    def _couple_groups(self, layer: StoredLayer, data: Channels | None, slots: Slots) -> None:
        groups = layer.blocks.shape[0]
        if layer.depthwise and data is not None:
            self.coupling.unite_all(slots, data.slots)
        elif groups > 1:
            for side in [slots] if data is None else [slots, data.slots]:
                self.coupling.fix(side, f"{layer.label} has {groups} groups")

    def _couple_users(self, layer: StoredLayer, data: Channels | None, slots: Slots) -> None:
        """Couple the inputs, and the outputs, of layers that share a weight."""
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
                self.coupling.unite_all(a, b)
        for side in [] if alike else [x.slots for x in (data, theirs) if x is not None] + list(sides[0]):
            self.coupling.fix(side, f"{layer.label} and {other.label} share a weight but not its form")


def uneven(layer: StoredLayer, data: Channels) -> Mask:
    """The inputs, [inputs], that even if constant would not add the same at all output positions."""
    return np.asarray(layer.padded & (data.values != 0))


def _layout(layer: StoredLayer) -> tuple[object, ...]:
    return layer.node.op_type, layer.blocks.shape, attribute(layer.node, "transB", 0)


def _shapes(model: onnx.ModelProto) -> Shapes:
    """Shapes as far as they can be inferred; 0 for unknown sizes."""
    graph = onnx.shape_inference.infer_shapes(weights_as_inputs(model, larger_than=_SMALL)).graph
    return {
        i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in (*graph.value_info, *graph.input, *graph.output)
    }
