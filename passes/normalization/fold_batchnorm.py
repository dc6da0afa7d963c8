"""Fold per-channel constant factors and offsets into the adjacent linear layer.

In inference, BatchNormalization is affine in each channel c, and so is a Mul, Div, Add or Sub with a constant of
one value per channel, which is how some exporters write it:

    y_c = a_c z_c + b_c,    a = γ / sqrt(σ² + ε),    b = β - a μ

After a layer z = W x + d with output channels o:      W'_o = a_o W_o,    d'_o = a_o d_o + b_o
Before a layer z = W y + d with input channels i:      W'_i = a_i W_i,    d' = d + W b

The second form requires a layer without padding, unless b = 0: padding is applied after the offset. (Ioffe & Szegedy,
"Batch Normalization", ICML 2015, section 3.1.)
"""

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.surgeon import Graph, Node, Tensor
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.linear_layer import (
    Float64,
    bias_of,
    float64,
    pads,
    per_channel,
    ranks_of,
    rewrite,
    sole_consumer,
    unfold,
    weight_of,
)

_AFFINE = {"BatchNormalization", "Mul", "Div", "Add", "Sub"}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold per-channel affine nodes into Conv, ConvTranspose, Gemm, and MatMul with a constant on the right.

    Assumes a normalized model: weights are initializers. Folds a node that is the only consumer of the layer before
    it, and a BatchNormalization whose only consumer is the layer after it; the tensor between must not be a graph
    output. Leaves everything else, including an Add after a MatMul, which is that layer's bias. Computes in float64
    and stores in the weight's dtype; does not fold values beyond its range.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        ranks = ranks_of(model)

        def fold(graph: Graph) -> None:
            for layer in list(graph.nodes):
                while _fold_after(graph, layer, ranks):
                    pass
            for norm in [n for n in graph.nodes if n.op == "BatchNormalization" and n.outputs]:
                fold_before(graph, norm, norm.inputs[0], ranks)

        return surgeon.edit(model, fold)


@dataclass(frozen=True)
class _Affine:
    """y = scale * z + shift, one value per channel."""

    scale: Float64
    shift: Float64


def _fold_after(graph: Graph, layer: Node, ranks: dict[str, int]) -> bool:
    """Fold the only consumer of `layer` into it; False if that is not possible."""
    if layer.op not in LAYER_TYPES:
        return False
    consumer = sole_consumer(graph, layer.outputs[0])
    # An Add after a MatMul is already the layer's bias.
    if consumer is None or consumer.op not in ({"BatchNormalization"} if layer.op == "MatMul" else _AFFINE):
        return False
    weight = weight_of(layer, ranks)
    if weight is None:
        return False
    rows = unfold(layer, weight)
    groups, outputs = rows.shape[:2]
    affine = _affine(consumer, layer.outputs[0], groups * outputs, weight.ndim)
    bias = bias_of(layer, groups * outputs)
    if affine is None or bias is None:
        return False
    rows = rows * affine.scale.reshape(groups, outputs, 1, 1)
    return rewrite(graph, layer, consumer, layer.outputs[0], rows, affine.scale * bias + affine.shift)


def fold_before(graph: Graph, node: Node, source: Tensor, ranks: dict[str, int]) -> bool:
    """Fold `node`, affine in each channel of `source`, into its only consumer.

    Returns False if that is not a layer, or pads where the shift would be missing.
    """
    layer = sole_consumer(graph, node.outputs[0])
    weight = weight_of(layer, ranks) if layer is not None else None
    if layer is None or weight is None or layer.attrs.get("transA", 0) or layer.inputs[0] is not node.outputs[0]:
        return False
    rows = unfold(layer, weight)
    groups, outputs, inputs = rows.shape[:3]
    affine = _affine(node, source, groups * inputs, weight.ndim)
    bias = bias_of(layer, groups * outputs)
    if affine is None or bias is None or (affine.shift.any() and pads(layer)):
        return False
    shift = (rows * affine.shift.reshape(groups, 1, inputs, 1)).sum(axis=(2, 3)).reshape(-1)
    rows = rows * affine.scale.reshape(groups, 1, inputs, 1)
    return rewrite(graph, layer, node, source, rows, layer.attrs.get("alpha", 1.0) * shift + bias)


def _affine(node: Node, source: Tensor, channels: int, rank: int) -> _Affine | None:
    """The scale and shift that `node` applies to each channel (axis 1) of `source`; None if it does anything else."""
    if not surgeon.standard(node):
        return None
    if node.op == "BatchNormalization":
        trains = node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:])
        parameters = [float64(t) for t in node.inputs[1:5]]
        gamma, beta, mean, variance = parameters
        if trains or gamma is None or beta is None or mean is None or variance is None:
            return None
        variance = variance + node.attrs.get("epsilon", 1e-5)
        if gamma.shape != (channels,) or not (variance > 0).all():
            return None
        scale = gamma / np.sqrt(variance)
        return _Affine(scale, beta - scale * mean)
    if node.op not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    first = node.inputs[0] is source
    value = per_channel(node.inputs[1 if first else 0], channels, rank)
    if value is None or (node.op == "Div" and not (first and value.all())):
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op in ("Mul", "Div"):
        return _Affine(value if node.op == "Mul" else 1 / value, zero)
    if node.op == "Add":
        return _Affine(one, value)
    return _Affine(one, -value) if first else _Affine(-one, value)
