"""Find what can be quantized in a normalized model, and why the rest is left in float.

A *layer* is a Conv, ConvTranspose, Gemm or MatMul with a constant weight; a *product* is a MatMul without one, as in
attention. An *activation* is a tensor that feeds a layer or a product, quantized where its values are computed: after
the activation function and before movement operators (MaxPool, Reshape, Concat of quantized parts, ...), which commute
with the quantizer. A *fusion tensor* is quantized to 8 bits only because ONNX Runtime's integer convolution requires a
quantized output, or because it is a residual stream beside narrow activations (residual_streams.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import NodeProto

from rdoq_onnx.analysis.activations import find_activations, find_branches, find_sums
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.pins import check_pins
from rdoq_onnx.analysis.skips import (
    QUANTIZED,
    Excludes,
    Finiteness,
    Refusal,
    Skip,
    check_excludes,
    fused_attention,
    integer_kernels,
    not_a_matrix,
    not_finite,
)
from rdoq_onnx.analysis.stored_weights import RECURRENT, find_slots, is_stack, stored_weights
from rdoq_onnx.analysis.ties import tied
from rdoq_onnx.config import Selection
from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.graph import MOVEMENT, Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES, Activation, Layer, Product, Use, block_sizes
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.branch_consumers import BranchConsumers
from rdoq_onnx.targets import Target

_NO_WEIGHT = Refusal("both inputs are computed, so there is no weight")


def analyse(model: onnx.ModelProto, selection: Selection, finiteness: Finiteness = not_finite) -> Network:
    """Find the layers and activations of a normalized `model` that `selection` asks to quantize.

    finiteness: `presumed_finite` reads no detached weights.
    Raises ModelError if nothing can be quantized; ConfigError if a pattern matches nothing.
    """
    graph, target = Graph(model), selection.target
    excludes = Excludes(selection.exclude, selection.exclude_ops)
    candidates, slots = _candidates(graph, finiteness), find_slots(graph)
    named = [(c.node.op_type, c.names) for c in candidates] + [(s.node.op_type, s.names) for s in slots]
    check_excludes(excludes, named)
    layers, refused = _layers(candidates, excludes, target)
    products = _products(candidates, excludes) if selection.activations and target.products and layers else ()
    refused = tuple(s for s in refused if s.node not in {p.node for p in products})
    multiplied = {x.weight: [u.node for u in x.uses] for x in layers}
    stored, left = stored_weights(graph, slots, multiplied, target, excludes, finiteness)
    skipped = (*refused, *integer_kernels(graph), *fused_attention(graph), *left)
    if not layers and not stored:
        raise ModelError(_nothing(skipped))
    activations: tuple[Activation, ...] = ()
    if selection.activations:
        sums = find_sums(graph, layers) if target.sums else {}
        activations = find_activations(graph, layers, products, sums)
        branches = find_branches(graph, layers, products, activations, sums, selection.narrow)
        if branches:
            return analyse(run_passes([BranchConsumers(branches)], model), selection, finiteness)
    network = Network(model, layers, activations, skipped, target, stored, products=products)
    network = _with_blocks(tied(network, finiteness), selection)
    check_pins(network, selection.pins)
    return network


def _with_blocks(network: Network, selection: Selection) -> Network:
    """Offer scales for blocks to the layers; what a table tied to one decodes has one scale a row."""
    tied_layers = {tie.layer for tie in network.ties}
    layers = (
        x if x.name in tied_layers else replace(x, blocks=block_sizes(x.linear, selection.blocks))
        for x in network.layers
    )
    return replace(network, layers=tuple(layers))


def _nothing(skipped: Sequence[Skip]) -> str:
    """The error message for a model in which nothing can be quantized."""
    reasons = "; ".join(f"{s.op_type} {s.node!r}: {s.reason}" for s in skipped[:3])
    kinds = f"no {', '.join(LAYER_TYPES)}, {', '.join(sorted(RECURRENT))} has a constant weight"
    return "the model has no layer to quantize" + (
        f" ({reasons})" if reasons else f": {kinds}, and no Gather reads from a table"
    )


def integer_ranges(model: onnx.ModelProto) -> dict[str, int]:
    """For each graph input that indexes a constant table (an embedding), the number of rows of the table."""
    graph = Graph(model)
    limits: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type == "Gather" and node.input[0] in graph.initializers:
            source = node.input[1]
            while (producer := graph.producer.get(source)) is not None and producer.op_type in (*MOVEMENT, "Cast"):
                source = producer.input[0]
            sizes, axis = graph.initializers[node.input[0]].dims, attribute(node, "axis", 0)
            if source in graph.inputs and -len(sizes) <= axis < len(sizes):
                rows = sizes[axis]
                limits[source] = min(rows, limits.get(source, rows))
    return limits


@dataclass(frozen=True)
class _Candidate:
    """A node with a layer's operator type, and its weight's name and form, or why the node stays in float."""

    node: NodeProto
    weight: tuple[str, Linear] | Refusal

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--exclude` accepts for it."""
        return (self.node.name,) if isinstance(self.weight, Refusal) else (self.node.name, self.weight[0])


def _candidates(graph: Graph, finiteness: Finiteness) -> tuple[_Candidate, ...]:
    return tuple(
        _Candidate(node, _read_layer(node, graph, finiteness))
        for node in graph.nodes
        if node.op_type in LAYER_TYPES and node.domain in ("", "ai.onnx") and not is_stack(node, graph)
    )


def _layers(
    candidates: Sequence[_Candidate], excludes: Excludes, target: Target
) -> tuple[tuple[Layer, ...], tuple[Skip, ...]]:
    """The layers that the search quantizes, each with all its uses, and the nodes that stay in float."""
    uses_of: dict[tuple[str, Linear], list[Use]] = {}
    skipped = []
    for candidate in candidates:
        node, weight = candidate.node, _searchable(candidate, excludes, target)
        if isinstance(weight, Refusal):
            skipped.append(Skip(node.name, node.op_type, weight.reason))
        else:
            name, linear = weight
            use = Use(node.name, node.input[1 - linear.weight_side], node.output[0], linear)
            uses_of.setdefault((name, linear.matrix), []).append(use)
    layers = tuple(Layer(uses[0].node, w, linear, tuple(uses)) for (w, linear), uses in uses_of.items())
    return layers, tuple(skipped)


def _products(candidates: Sequence[_Candidate], excludes: Excludes) -> tuple[Product, ...]:
    """The products of two activations that may run on integers."""
    return tuple(
        Product(c.node.name, (c.node.input[0], c.node.input[1]), c.node.output[0])
        for c in candidates
        if c.node.op_type == "MatMul" and c.weight is _NO_WEIGHT and excludes.refusal("MatMul", c.names) is None
    )


def _searchable(candidate: _Candidate, excludes: Excludes, target: Target) -> tuple[str, Linear] | Refusal:
    """The candidate's weight, unless it is excluded or `target` does not support a scale per channel."""
    op_type, weight = candidate.node.op_type, candidate.weight
    excluded = excludes.refusal(op_type, candidate.names)
    if isinstance(weight, Refusal) or (excluded is None and op_type not in target.one_scale):
        return weight
    return excluded or Refusal(
        f"--target {target.name} takes one scale for its weight, but here each channel has its own"
    )


def _read_layer(node: NodeProto, graph: Graph, finiteness: Finiteness) -> tuple[str, Linear] | Refusal:
    """The weight of a node and how it unfolds, or why the node stays in float."""
    constant = [k for k in (0, 1) if node.input[k] in graph.constants]
    if not constant:
        return _NO_WEIGHT
    if len(constant) == 2:
        return Refusal("both inputs are constant; fold constants when exporting")
    side = constant[0]
    if side == 0 and node.op_type != "MatMul":
        return Refusal("the constant is the data input, not the weight; swap them if the operator allows it")
    tensor = graph.initializers.get(node.input[side])
    if tensor is None:
        return _computed(node.input[side], graph)
    shape = tuple(tensor.dims)
    unfit = not_a_matrix(tensor) or (Refusal("its weight is empty") if 0 in shape else finiteness(tensor))
    return unfit or (tensor.name, _linear(node, shape, side))


def _computed(weight: str, graph: Graph) -> Refusal:
    """Why a weight that is not an initializer stays in float."""
    producer = graph.producer.get(weight)
    op_type = producer.op_type if producer is not None else "node outside this graph"
    if op_type == "DequantizeLinear":
        return Refusal(QUANTIZED)
    return Refusal(f"its weight {weight!r} is computed from constants by a {op_type}; fold constants when exporting")


def _linear(node: NodeProto, shape: tuple[int, ...], side: int) -> Linear:
    if node.op_type == "MatMul":
        return Linear("MatMul", shape, weight_side=side)
    if node.op_type == "Gemm":
        return Linear(
            "Gemm",
            shape,
            trans_a=bool(attribute(node, "transA", 0)),
            trans_b=bool(attribute(node, "transB", 0)),
            alpha=float(attribute(node, "alpha", 1.0)),
        )
    return Linear(
        node.op_type,
        shape,
        group=attribute(node, "group", 1),
        strides=tuple(attribute(node, "strides", ())),
        dilations=tuple(attribute(node, "dilations", ())),
        pads=tuple(attribute(node, "pads", ())),
        auto_pad=attribute(node, "auto_pad", b"NOTSET").decode(),
        output_padding=tuple(attribute(node, "output_padding", ())),
        output_shape=tuple(attribute(node, "output_shape", ())[-(len(shape) - 2) :]),
    )
