"""Which channels of which tensors must share a scale: union-find over the operators between two layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.graph import SHAPE_OPS, Graph, attribute
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.protos import reads
from rdoq_onnx.model.union_find import UnionFind

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool"})
HOMOGENEOUS |= {"GlobalMaxPool"}
# These preserve channels if axis 1 keeps its size.
SHAPES = frozenset({"Flatten", "Reshape", "Squeeze"})
_SPATIAL_MEANS = ((2, 3), (-2, -1), (-1, -2), (3, 2))
Slots = NDArray[np.int64]


@dataclass
class Chains:
    """The slot of each channel of each tensor (channels of one slot share a scale), and the nodes at the ends.

    outputs, inputs: slots of a layer's output and input channels, by the layer's name. clips: slots of each Clip node,
        [C, 1, ...], which broadcast to its output. fixed: slots whose scale must not change. component: of each slot.
    """

    slots: dict[str, Slots] = field(default_factory=dict)
    outputs: dict[str, Slots] = field(default_factory=dict)
    inputs: dict[str, Slots] = field(default_factory=dict)
    clips: dict[str, Slots] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    component: dict[int, int] = field(default_factory=dict)


def find_chains(network: Network, shapes: Mapping[str, tuple[int, ...]]) -> Chains:
    """Assign slots to all tensors of `shapes`; their channels (axis 1) broadcast as [C, 1, ...]."""
    graph = Graph(network.model)
    single = {x.uses[0].node: x for x in network.layers if len(x.uses) == 1}
    shared = _nodes_with_shared_constants(graph)
    union = SlotUnion(graph, shapes)
    layers = []
    for node in graph.nodes:
        if node.name in single and node.name not in shared and _scalable(node, single[node.name], graph):
            layers.append(node)
        elif node.op_type not in SHAPE_OPS and not union.unite(node):
            union.fix([*reads([node]), *node.output])
    union.fix([*graph.inputs, *graph.outputs])
    chains = Chains(union.resolved(), component=union.components())
    for node in layers:
        for edge, tensor in ((chains.inputs, node.input[0]), (chains.outputs, node.output[0])):
            if tensor in chains.slots:
                edge[node.name] = chains.slots[tensor]
    chains.clips = {n.name: chains.slots[n.output[0]].reshape(shapes[n.output[0]]) for n in union.clips}
    produced = {int(s) for slots in chains.outputs.values() for s in slots}
    consumed = {int(s) for slots in chains.inputs.values() for s in slots}
    everything = {int(s) for slots in chains.slots.values() for s in slots}
    chains.fixed = {union.find(s) for s in union.fixed} | (everything - (produced & consumed))
    return chains


class SlotUnion:
    """Union-find over slots; every tensor starts with slots of its own."""

    ALL = HOMOGENEOUS | SHAPES | {"Add", "Clip", "ReduceMean", "Slice", "Pad", "Concat"}

    def __init__(self, graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._graph, self._shapes = graph, shapes
        self._slots: dict[str, Slots] = {}
        self._sets = UnionFind()
        self.fixed: set[int] = set()
        self.clips: list[onnx.NodeProto] = []
        for name, shape in shapes.items():
            self._slots[name] = self._sets.new(shape[0])

    def find(self, slot: int) -> int:
        return self._sets.find(slot)

    def fix(self, tensors: list[str]) -> None:
        for name in tensors:
            self.fixed.update(self._slots.get(name, np.empty(0, np.int64)).tolist())

    def unite(self, node: onnx.NodeProto) -> bool:
        """Unite the slots that must share a scale across `node`; return False if scales do not pass through it."""
        if node.domain not in ("", "ai.onnx") or node.op_type not in self.ALL or len(node.output) > 1:
            return False
        pairs = list(self._pairs(node))
        if not pairs or any(len(a) != len(b) for a, b in pairs):
            return False
        for a, b in pairs:
            self._sets.unite_all(a, b)
        if node.op_type == "Clip":
            self.clips.append(node)
        return True

    def resolved(self) -> dict[str, Slots]:
        return {name: self._sets.roots(slots) for name, slots in self._slots.items()}

    def components(self) -> dict[int, int]:
        """Return the component of each slot; tensors that share a slot are in one component."""
        owner: dict[int, int] = {}
        groups = UnionFind()
        for group, slots in zip(groups.new(len(self._slots)).tolist(), self._slots.values(), strict=True):
            for slot in self._sets.roots(slots).tolist():
                groups.unite(owner.setdefault(slot, group), group)
        return {slot: groups.find(group) for slot, group in owner.items()}

    def _pairs(self, node: onnx.NodeProto) -> Iterator[tuple[Slots, Slots]]:
        """Yield pairs of slot arrays that `node` unites element by element; none if it unites none."""
        out = self._slots.get(node.output[0])
        data = [self._slots.get(i) for i in node.input]
        if out is None or data[0] is None:
            return
        if node.op_type == "Add" or (node.op_type == "Concat" and attribute(node, "axis", 1) == 1):
            ranks = {len(self._shapes.get(name, ())) for name in (*node.input, node.output[0])}
            if any(d is None for d in data) or len(ranks) > 1:  # unequal ranks do not broadcast channel to channel
                return
            parts = [d for d in data if d is not None]
            if node.op_type == "Concat":
                parts = [np.concatenate(parts)]
            yield from ((part, out) for part in parts)
        elif node.op_type == "Pad":
            before, after = self._padding(node)
            if before >= 0:
                yield data[0], out[before : len(out) - after]
        elif self._preserves_channels(node):
            yield data[0], out

    def _preserves_channels(self, node: onnx.NodeProto) -> bool:
        """Whether scaling an input channel scales the same output channel."""
        if node.op_type == "Clip":
            bounds = [self._graph.constant(i) for i in node.input[1:]]
            if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
                return False
            return float(bounds[0]) == 0 and float(bounds[1]) > 0
        if node.op_type == "PRelu":
            return node.input[1] in self._graph.constants  # one slope, or one per channel
        if node.op_type == "ReduceMean":
            attribute_axes = np.array(attribute(node, "axes", None) or ())
            means = self._graph.constant(node.input[1]) if len(node.input) > 1 else attribute_axes
            return means is not None and tuple(means.tolist()) in _SPATIAL_MEANS
        if node.op_type == "Slice":
            axes = self._graph.constant(node.input[3]) if len(node.input) > 3 else None
            return axes is not None and bool((axes >= 2).all())
        return node.op_type in HOMOGENEOUS or node.op_type in SHAPES

    def _padding(self, node: onnx.NodeProto) -> tuple[int, int]:
        """Return the numbers of zero channels before and after; (-1, -1) for any other padding."""
        pads = self._graph.constant(node.input[1]) if len(node.input) in (2, 3) else None
        value = self._graph.constant(node.input[2]) if len(node.input) == 3 and node.input[2] else np.zeros(1)
        plain = attribute(node, "mode", b"constant") == b"constant" and value is not None and not value.any()
        if pads is None or not plain or pads[0] or pads[len(pads) // 2]:
            return -1, -1
        return int(pads[1]), int(pads[len(pads) // 2 + 1])


def _scalable(node: onnx.NodeProto, layer: Layer, graph: Graph) -> bool:
    constant = all(not i or i in graph.initializers for i in node.input[2:])
    return constant and (node.op_type == "Conv" or (node.op_type == "Gemm" and not layer.linear.trans_a))


def _nodes_with_shared_constants(graph: Graph) -> set[str]:
    """Return the names of nodes whose weight or bias has another consumer."""
    names: set[str] = set()
    for tensor, proto in graph.initializers.items():
        consumers = graph.consumers.get(tensor, [])
        if len(consumers) > 1 and np.prod(proto.dims) > 1:
            names.update(n.name for n in consumers)
    return names
