"""Find the quantized tensors whose channels may be scaled, and what absorbs the scales.

    x / r  →  W · r

All layers that read x have their columns multiplied by r. The division goes into the constants upstream of x as far as
they are x's alone: gain and bias of a normalization, weight and bias of a linear layer, V's projection behind the
product with the attention weights, a per-channel constant, one side of a gate. Where nothing absorbs it, x is
multiplied by 1 / r. For a product of two activations over channels, as of queries and keys, q / r and k · r are both
absorbed, or neither.
"""

from dataclasses import dataclass

import numpy as np

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.absorbing import Absorber, Place
from rdoq_onnx.candidates.channel_labels import Labels, Shapes, distinct, downstream, of_rank, upstream
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.layers import Activation, Layer, Product, Use


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


def find_groups(network: Network, shapes: Shapes) -> list[ScaleGroup]:
    """Find the groups of `network`, in graph order. shapes: of all tensors, for a batch of two samples if it can be."""
    finder = _Finder(network, shapes)
    groups: list[ScaleGroup] = []
    taken: set[str] = set()
    found = (*map(finder.group, network.activations), *map(finder.product, network.products))
    for group in found:
        if group is not None and taken.isdisjoint(names := {p.name for p in group.tensors}):
            groups.append(group)
            taken |= names
    return groups


class _Finder:
    def __init__(self, network: Network, shapes: Shapes) -> None:
        self._graph, self._shapes, self._above = Graph(network.model), shapes, Absorber(network, shapes)
        self._uses: dict[str, tuple[Layer, Use]] = {u.node: (x, u) for x in network.layers for u in x.uses}
        weights, tied = [x.weight for x in network.layers], {tie.layer for tie in network.ties}
        self._single = {x.name for x in network.layers if len(x.uses) == 1 and weights.count(x.weight) == 1} - tied

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
        absorbed = self._above.absorb(activation.tensor, labels, -1)
        if absorbed is None:
            return ScaleGroup(channels, (own,), weights, tuple(layers), multiplied=(own,))
        tensors = (own, *absorbed.tensors)
        return ScaleGroup(
            channels, tensors, (*weights, *absorbed.constants), tuple(layers), operands=tuple(absorbed.operands)
        )

    def product(self, product: Product) -> ScaleGroup | None:
        """Return the group of the operands of a product, if what produces both absorbs scales and one is quantized."""
        shapes = [self._shapes.get(operand, ()) for operand in product.operands]
        if min(map(len, shapes)) < 2 or len({shape[1:-2] for shape in shapes}) > 1:
            return None
        *heads, inner = *shapes[0][1:-2], shapes[0][-1]
        labels = np.arange(int(np.prod(heads)) * inner).reshape(*heads, 1, inner)
        left = self._above.above(product.operands[0], labels, -1)
        right = self._above.above(product.operands[1], labels.swapaxes(-1, -2), 1)
        if left is None or right is None or not (left + right).tensors:
            return None
        both = left + right
        return ScaleGroup(labels.size, tuple(both.tensors), tuple(both.constants), (), operands=tuple(both.operands))

    def _labels(self, activation: Activation) -> Labels | None:
        """Number the input channels of a layer that reads `activation`; return their labels at the tensor itself."""
        tensor = activation.feeds[0]
        readers = [self._uses[n.name] for n in self._graph.consumers.get(tensor, []) if n.name in self._uses]
        labels = next((own for layer, use in readers if (own := _input_labels(layer, use)) is not None), None)
        while labels is not None and tensor != activation.tensor:
            node = self._graph.producer[tensor]
            labels, tensor = upstream(node, tensor, labels, self._shapes), node.input[0]
        return labels if labels is not None and distinct(labels) else None

    def _spread(self, tensor: str, labels: Labels) -> list[tuple[Layer, Place]] | None:
        """List the layers that read `tensor`, with the weights that r multiplies; None if anything else does."""
        found: list[tuple[Layer, Place]] = []
        if tensor in self._graph.outputs:
            return None
        for node in self._above.consumers(tensor):
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
