"""What absorbs a scale upstream of a tensor: constants that are the tensor's alone, or a Mul on a gate.

    x · r^p  =  f(c · r^p, ...)

The walk ends at the gain and bias of a normalization, at the weight and bias of a linear layer, at a per-channel
constant. It passes through movement operators, positively homogeneous functions, sums (in all terms), products of two
tensors (in one factor) and products of two matrices (in the right one).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.channel_labels import Labels, Shapes, distinct, fits, of_rank, upstream
from rdoq_onnx.model.graph import SHAPE_OPS, Graph, attribute

_GATE = 8  # a Mul goes to the side of a gate that has this many times fewer elements
_GELU = frozenset({"Erf", "Tanh", "Gelu"})  # ONNX Runtime fuses a Gelu only around scalars


@dataclass(frozen=True)
class Place:
    """A tensor or an input of a node, the labels of its elements, and the power of r that it is multiplied by."""

    name: str
    labels: Labels
    power: int
    index: int = -1


@dataclass
class Absorbed:
    """What absorbs a scale so far."""

    constants: list[Place] = field(default_factory=list)
    operands: list[Place] = field(default_factory=list)
    tensors: list[Place] = field(default_factory=list)

    def __add__(self, other: "Absorbed") -> "Absorbed":
        return Absorbed(self.constants + other.constants, self.operands + other.operands, self.tensors + other.tensors)


class Absorber:
    """Look-ups of one network. shapes: of all tensors, for a batch of two samples if it can be."""

    def __init__(self, network: Network, shapes: Shapes) -> None:
        self._graph, self._shapes = Graph(network.model), shapes
        self._quantized = {a.tensor for a in network.activations}
        weights = [x.weight for x in network.layers]
        self._shared = {
            u.node for x in network.layers for u in x.uses if len(x.uses) > 1 or weights.count(x.weight) > 1
        }

    def consumers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read the values of `tensor`."""
        return [n for n in self._graph.consumers.get(tensor, []) if n.op_type not in SHAPE_OPS]

    def _sole(self, tensor: str) -> bool:
        reads = [i for n in self.consumers(tensor) for i in n.input if i == tensor]  # x · x reads x twice
        return len(reads) == 1 and tensor not in self._graph.outputs

    def above(self, tensor: str, labels: Labels, power: int) -> Absorbed | None:
        """Absorb r^power in front of `tensor`, which must have one consumer."""
        shape = self._shapes.get(tensor)
        if shape is None or not self._sole(tensor) or not fits(labels, shape):
            return None
        absorbed = self.absorb(tensor, labels, power)
        if absorbed is not None and tensor in self._quantized:
            absorbed.tensors.append(Place(tensor, labels, power))
        return absorbed

    def absorb(self, tensor: str, labels: Labels, power: int) -> Absorbed | None:
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
        if not computed or computed[0] != 0 or (len(computed) > 1 and node.op_type == "PRelu"):
            return None
        moved = upstream(node, tensor, labels, self._shapes)
        return None if moved is None else self.above(node.input[0], moved, power)

    def _constants(self, node: NodeProto, labels: Labels, power: int) -> Absorbed | None:
        """Absorb in the output channels of a linear layer, or in the gain and bias of a normalization."""
        channels = labels.reshape(-1)
        rank = len(self._shapes[node.output[0]])
        axis = 1 if node.op_type == "Conv" else rank - 1
        if of_rank(labels, rank).shape[axis] != channels.size or not distinct(labels):
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
                if node.name in self._shared or (node.op_type == "MatMul" and len(shape) != 2):
                    return None
                first = node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0))
                place = channels.reshape((-1, *[1] * (len(shape) - 1)) if first else (1, -1))
            elif shape != (channels.size,) and shape != (1, channels.size):
                return None
            places.append(Place(node.name, place, power, index))
        return Absorbed(places)

    def _product(self, node: NodeProto, labels: Labels, power: int) -> Absorbed | None:
        """Absorb in the right operand of a product of two activations."""
        rank = len(self._shapes[node.output[0]])
        if of_rank(labels, rank).shape[-2] != 1 or len(self._shapes[node.input[1]]) != rank:
            return None
        return self.above(node.input[1], labels, power)

    def _sum(self, node: NodeProto, labels: Labels, power: int) -> Absorbed | None:
        """Absorb in both terms of a sum, each of which is a constant or has no other consumer."""
        total = Absorbed()
        for index, name in enumerate(node.input):
            if name in self._graph.initializers:
                term: Absorbed | None = Absorbed([Place(node.name, labels, power, index)]) if distinct(labels) else None
            else:
                term = self.above(name, labels, power)
            if term is None:
                return None
            total = total + term
        return total

    def _scaling(self, node: NodeProto, labels: Labels, power: int, computed: Sequence[int]) -> Absorbed | None:
        """Absorb in one factor: a computed one, a constant, or by a Mul in front of a small one, as that of a gate."""
        for index in computed:
            if node.op_type == "Mul" or index == 0:
                absorbed = self.above(node.input[index], labels, power)
                if absorbed is not None:
                    return absorbed
        if not distinct(labels):
            return None
        if len(computed) == 1:
            index = 1 - computed[0]
            if node.input[index] not in self._graph.initializers or self._is_gelu(node.input[computed[0]]):
                return None
            sign = -1 if node.op_type == "Div" and index == 1 else 1
            return Absorbed([Place(node.name, labels, power * sign, index)])
        sizes = [int(np.prod(self._shapes[i])) if i in self._shapes else 0 for i in node.input]
        small = int(np.argmin(sizes))
        is_gate = node.op_type == "Mul" and 0 < sizes[small] * _GATE <= max(sizes)
        if not is_gate or not fits(labels, self._shapes[node.input[small]]):
            return None
        return Absorbed(operands=[Place(node.name, labels, power, small)])

    def _is_gelu(self, tensor: str) -> bool:
        """Whether `tensor` is part of a Gelu."""
        nodes = [self._graph.producer.get(tensor)]
        for _ in range(3):
            nodes = [self._graph.producer.get(i) for n in nodes if n is not None for i in n.input]
            if any(n is not None and n.op_type in _GELU for n in nodes):
                return True
        return False
