"""Find the quantized tensors whose channels may be scaled, and what absorbs the scales.

    x / r  →  W · r

All layers that read x have their columns multiplied by r. The division goes into the constants upstream of x as far as
they are x's alone: gain and bias of a normalization, weight and bias of a linear layer, V's projection behind the
product with the attention weights, a per-channel constant, one side of a gate. Where nothing absorbs it, x is
multiplied by 1 / r. For a product of two activations, q / r and k · r are both absorbed, or neither.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.channel_labels import Labels, Shapes, downstream, of_rank, upstream
from rdoq_onnx.model.graph import SHAPE_OPS, Graph, attribute
from rdoq_onnx.model.layers import Activation, Layer, Use

_GATE = 8  # a Mul goes to the side of a gate that has this many times fewer elements
_GELU = frozenset({"Erf", "Tanh", "Gelu"})  # ONNX Runtime fuses a Gelu only around scalars


@dataclass(frozen=True)
class Place:
    """A tensor or an input of a node, the labels of its elements, and the power of r that it is multiplied by."""

    name: str
    labels: Labels
    power: int
    index: int = -1


@dataclass(frozen=True)
class ScaleGroup:
    """Tensors that share the scale r of each channel.

    channels: their number. tensors: quantized tensors. constants: inputs of nodes that absorb a power of r. layers:
    weights among them that are not free of cost, as their rows keep one scale. multiplied: tensors that need a Mul.
    operands: inputs of nodes that need one.
    """

    channels: int
    tensors: tuple[Place, ...]
    constants: tuple[Place, ...]
    layers: tuple[tuple[Layer, Place], ...]
    multiplied: tuple[Place, ...] = ()
    operands: tuple[Place, ...] = ()


@dataclass
class _Absorbed:
    """What absorbs a scale so far."""

    constants: list[Place] = field(default_factory=list)
    operands: list[Place] = field(default_factory=list)
    tensors: list[Place] = field(default_factory=list)

    def __add__(self, other: "_Absorbed") -> "_Absorbed":
        return _Absorbed(
            self.constants + other.constants, self.operands + other.operands, self.tensors + other.tensors
        )


def find_groups(network: Network, shapes: Shapes) -> list[ScaleGroup]:
    """Find the groups of `network`, in graph order. shapes: of all tensors, for a batch of two samples if it can be."""
    finder = _Finder(network, shapes)
    groups: list[ScaleGroup] = []
    taken: set[str] = set()
    for activation in network.activations:
        group = finder.group(activation)
        if group is not None and taken.isdisjoint(names := {p.name for p in group.tensors}):
            groups.append(group)
            taken |= names
    return groups


class _Finder:
    def __init__(self, network: Network, shapes: Shapes) -> None:
        self._graph, self._shapes = Graph(network.model), shapes
        self._quantized = {a.tensor for a in network.activations}
        self._uses: Mapping[str, tuple[Layer, Use]] = {u.node: (x, u) for x in network.layers for u in x.uses}
        weights = [x.weight for x in network.layers]
        self._single = {x.name for x in network.layers if len(x.uses) == 1 and weights.count(x.weight) == 1}

    def group(self, activation: Activation) -> ScaleGroup | None:
        """Return the group of a tensor that only layers read, behind movement operators."""
        if activation.fusion or activation.parts or activation.tensor not in self._graph.producer:
            return None
        labels = self._labels(activation)
        if labels is None:
            return None
        layers = self._spread(activation.tensor, labels)
        if not layers:
            return None
        channels, own = int(labels.max()) + 1, Place(activation.tensor, labels, -1)
        weights = tuple(place for _, place in layers)
        absorbed = self._absorb(activation.tensor, labels, -1)
        if absorbed is None:
            return ScaleGroup(channels, (own,), weights, tuple(layers), multiplied=(own,))
        tensors = (own, *absorbed.tensors)
        return ScaleGroup(
            channels, tensors, (*weights, *absorbed.constants), tuple(layers), operands=tuple(absorbed.operands)
        )

    def _labels(self, activation: Activation) -> Labels | None:
        """Number the input channels of a layer that reads `activation`; return their labels at the tensor itself."""
        tensor = activation.feeds[0]
        readers = [self._uses[n.name] for n in self._graph.consumers.get(tensor, []) if n.name in self._uses]
        labels = next((own for layer, use in readers if (own := _input_labels(layer, use)) is not None), None)
        while labels is not None and tensor != activation.tensor:
            node = self._graph.producer[tensor]
            labels, tensor = upstream(node, tensor, labels, self._shapes), node.input[0]
        return labels if labels is not None and _distinct(labels) else None

    def _spread(self, tensor: str, labels: Labels) -> list[tuple[Layer, Place]] | None:
        """List the layers that read `tensor`, with the weights that r multiplies; None if anything else does."""
        found: list[tuple[Layer, Place]] = []
        if tensor in self._graph.outputs:
            return None
        for node in self._consumers(tensor):
            if node.name in self._uses:
                layer, use = self._uses[node.name]
                weight = _weight_labels(layer, labels) if layer.name in self._single and use.data == tensor else None
                if weight is None:
                    return None
                found.append((layer, Place(node.name, weight, 1, layer.linear.weight_side)))
                continue
            moved = downstream(node, labels, self._shapes) if node.input[0] == tensor else None
            further = None if moved is None else self._spread(node.output[0], moved)
            if further is None:
                return None
            found += further
        return found

    def _consumers(self, tensor: str) -> list[NodeProto]:
        return [n for n in self._graph.consumers.get(tensor, []) if n.op_type not in SHAPE_OPS]

    def _sole(self, tensor: str) -> bool:
        return len(self._consumers(tensor)) == 1 and tensor not in self._graph.outputs

    def _above(self, tensor: str, labels: Labels, power: int) -> _Absorbed | None:
        """Absorb r^power in front of `tensor`, which must have one consumer."""
        shape = self._shapes.get(tensor)
        if shape is None or not self._sole(tensor) or not _fits(labels, shape):
            return None
        absorbed = self._absorb(tensor, labels, power)
        if absorbed is not None and tensor in self._quantized:
            absorbed.tensors.append(Place(tensor, labels, power))
        return absorbed

    def _absorb(self, tensor: str, labels: Labels, power: int) -> _Absorbed | None:
        """Absorb r^power in what produces `tensor`; None if it cannot."""
        node = self._graph.producer.get(tensor)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        computed = [k for k, i in enumerate(node.input) if i and i not in self._graph.constants]
        if node.op_type in ("LayerNormalization", "RMSNormalization", "MatMul", "Gemm", "Conv"):
            if node.op_type == "MatMul" and len(computed) == 2:
                return self._product(node, labels, power)
            return self._constants(node, labels, power)
        if node.op_type in ("Mul", "Div", "Add", "Sub") and len(node.input) == 2:
            if node.op_type in ("Add", "Sub"):
                return self._sum(node, labels, power)
            return self._scaling(node, labels, power, computed)
        if computed != [0]:
            return None
        moved = upstream(node, tensor, labels, self._shapes)
        return None if moved is None else self._above(node.input[0], moved, power)

    def _constants(self, node: NodeProto, labels: Labels, power: int) -> _Absorbed | None:
        """Absorb in the output channels of a linear layer, or in the gain and bias of a normalization."""
        channels = labels.reshape(-1)
        rank = len(self._shapes[node.output[0]])
        axis = 1 if node.op_type == "Conv" else rank - 1
        if of_rank(labels, rank).shape[axis] != channels.size or not _distinct(labels):
            return None
        if attribute(node, "axis", -1) not in (-1, rank - 1) or channels.size != self._shapes[node.output[0]][axis]:
            return None
        if any(i and i not in self._graph.initializers for i in node.input[1:]):
            return None
        places = []
        for index in (k for k in range(1, len(node.input)) if node.input[k]):
            shape = tuple(self._graph.initializers[node.input[index]].dims)
            place = channels
            if index == 1 and node.op_type in ("Conv", "Gemm", "MatMul"):
                if node.name in self._uses and self._uses[node.name][0].name not in self._single:
                    return None
                if node.op_type == "MatMul" and len(shape) != 2:
                    return None
                first = node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0))
                place = channels.reshape((-1, *[1] * (len(shape) - 1)) if first else (1, -1))
            elif shape != (channels.size,) and shape != (1, channels.size):
                return None
            places.append(Place(node.name, place, power, index))
        return _Absorbed(places)

    def _product(self, node: NodeProto, labels: Labels, power: int) -> _Absorbed | None:
        """Absorb in the right operand of a product of two activations."""
        rank = len(self._shapes[node.output[0]])
        if of_rank(labels, rank).shape[-2] != 1 or len(self._shapes[node.input[1]]) != rank:
            return None
        return self._above(node.input[1], labels, power)

    def _sum(self, node: NodeProto, labels: Labels, power: int) -> _Absorbed | None:
        """Absorb in both terms of a sum, each of which is a constant or has no other consumer."""
        total = _Absorbed()
        for index, name in enumerate(node.input):
            if name in self._graph.initializers:
                term: _Absorbed | None = _Absorbed([Place(node.name, labels, power, index)]) if _distinct(labels) else None
            else:
                term = self._above(name, labels, power)
            if term is None:
                return None
            total = total + term
        return total

    def _scaling(self, node: NodeProto, labels: Labels, power: int, computed: Sequence[int]) -> _Absorbed | None:
        """Absorb in one factor: a computed one, a constant, or by a Mul in front of a small one, as that of a gate."""
        for index in computed:
            if node.op_type == "Mul" or index == 0:
                absorbed = self._above(node.input[index], labels, power)
                if absorbed is not None:
                    return absorbed
        if not _distinct(labels):
            return None
        if len(computed) == 1:
            index = 1 - computed[0]
            if node.input[index] not in self._graph.initializers or self._is_gelu(node.input[computed[0]]):
                return None
            sign = -1 if node.op_type == "Div" and index == 1 else 1
            return _Absorbed([Place(node.name, labels, power * sign, index)])
        sizes = [int(np.prod(self._shapes[i])) if i in self._shapes else 0 for i in node.input]
        small = int(np.argmin(sizes))
        if node.op_type == "Mul" and 0 < sizes[small] * _GATE <= max(sizes):
            if _fits(labels, self._shapes[node.input[small]]):
                return _Absorbed(operands=[Place(node.name, labels, power, small)])
        return None

    def _is_gelu(self, tensor: str) -> bool:
        """Whether `tensor` is part of a Gelu."""
        nodes = [self._graph.producer.get(tensor)]
        for _ in range(3):
            nodes = [self._graph.producer.get(i) for n in nodes if n is not None for i in n.input]
            if any(n is not None and n.op_type in _GELU for n in nodes):
                return True
        return False


def _distinct(labels: Labels) -> bool:
    """Whether each channel has one element: a batch axis that was merged with another would repeat it."""
    real = labels[labels >= 0]
    return len(np.unique(real)) == real.size


def _fits(labels: Labels, shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape has all the axes of `labels`."""
    if labels.ndim > len(shape):
        return all(n == 1 for n in labels.shape[: labels.ndim - len(shape)]) and _fits(labels[0], shape)
    return all(a in (1, b) for a, b in zip(labels.shape[::-1], shape[::-1], strict=False))


def _input_labels(layer: Layer, use: Use) -> Labels | None:
    """Number the channels of a layer's input."""
    linear = use.linear
    if linear.op_type == "MatMul" and len(linear.shape) == 2:
        return np.arange(linear.inputs) if linear.weight_side == 1 else None
    if linear.op_type == "Gemm":
        return None if linear.trans_a else np.arange(linear.inputs)
    if linear.op_type == "Conv":
        return np.arange(linear.shape[1] * linear.group).reshape(-1, *[1] * (len(linear.shape) - 2))
    return None


def _weight_labels(layer: Layer, labels: Labels) -> Labels | None:
    """Return the labels of a layer's weight from those of its input; None if they are not those of its channels."""
    linear, flat = layer.linear, labels.reshape(-1)
    if linear.op_type == "Conv":
        rank, width = len(linear.shape), linear.shape[1]
        if flat.size != width * linear.group or of_rank(labels, rank).shape[1] != flat.size:
            return None
        rows = np.repeat(flat.reshape(linear.group, width), linear.shape[0] // linear.group, axis=0)
        return rows.reshape(*rows.shape, *[1] * (rank - 2))
    if linear.op_type not in ("MatMul", "Gemm") or linear.weight_side == 0 or linear.trans_a or len(linear.shape) != 2:
        return None
    if flat.size != linear.inputs or labels.shape[-1] != flat.size:
        return None
    return flat[None, :] if linear.trans_b else flat[:, None]


def places(groups: Iterable[ScaleGroup]) -> list[str]:
    """List the quantized tensors of `groups`."""
    return list(dict.fromkeys(p.name for g in groups for p in g.tensors))
