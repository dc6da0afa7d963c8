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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, shape_inference

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor
from rdoq_onnx.passes import Pass

Float64 = NDArray[np.float64]
_AFFINE = {"BatchNormalization", "Mul", "Div", "Add", "Sub"}
_STORED = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64)}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold per-channel affine nodes into Conv, ConvTranspose, Gemm, and MatMul with a constant on the right.

    Assumes a normalized model: weights are initializers. Folds a node that is the only consumer of the layer before
    it, and a BatchNormalization whose only consumer is the layer after it; the tensor between must not be a graph
    output. Leaves everything else, including an Add after a MatMul, which is that layer's bias. Computes in float64
    and stores in the weight's dtype; does not fold values beyond its range.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        ranks = _ranks(model)

        def fold(graph: Graph) -> None:
            for layer in list(graph.nodes):
                while _fold_after(graph, layer, ranks):
                    pass
            for norm in [n for n in graph.nodes if n.op == "BatchNormalization" and n.outputs]:
                _fold_before(graph, norm, ranks)

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
    consumer = _sole_consumer(graph, layer.outputs[0])
    # An Add after a MatMul is already the layer's bias.
    if consumer is None or consumer.op not in ({"BatchNormalization"} if layer.op == "MatMul" else _AFFINE):
        return False
    weight = _weight(layer, ranks)
    if weight is None:
        return False
    rows = _unfold(layer, weight)
    groups, outputs = rows.shape[:2]
    affine = _affine(consumer, layer.outputs[0], groups * outputs, weight.ndim)
    bias = _bias(layer, groups * outputs)
    if affine is None or bias is None:
        return False
    rows = rows * affine.scale.reshape(groups, outputs, 1, 1)
    return _rewrite(graph, layer, consumer, layer.outputs[0], rows, affine.scale * bias + affine.shift)


def _fold_before(graph: Graph, norm: Node, ranks: dict[str, int]) -> bool:
    """Fold `norm` into its only consumer; False if that is not a layer, or pads where the shift would be missing."""
    layer = _sole_consumer(graph, norm.outputs[0])
    weight = _weight(layer, ranks) if layer is not None else None
    if layer is None or weight is None or layer.attrs.get("transA", 0) or layer.inputs[0] is not norm.outputs[0]:
        return False
    rows = _unfold(layer, weight)
    groups, outputs, inputs = rows.shape[:3]
    affine = _affine(norm, norm.inputs[0], groups * inputs, weight.ndim)
    bias = _bias(layer, groups * outputs)
    if affine is None or bias is None or (affine.shift.any() and _pads(layer)):
        return False
    shift = (rows * affine.shift.reshape(groups, 1, inputs, 1)).sum(axis=(2, 3)).reshape(-1)
    rows = rows * affine.scale.reshape(groups, 1, inputs, 1)
    return _rewrite(graph, layer, norm, norm.inputs[0], rows, layer.attrs.get("alpha", 1.0) * shift + bias)


def _affine(node: Node, source: Tensor, channels: int, rank: int) -> _Affine | None:
    """The scale and shift that `node` applies to each channel (axis 1) of `source`; None if it does anything else."""
    if not surgeon.standard(node):
        return None
    if node.op == "BatchNormalization":
        trains = node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:])
        parameters = [_float64(t) for t in node.inputs[1:5]]
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
    value = _per_channel(node.inputs[1 if first else 0], channels, rank)
    if value is None or (node.op == "Div" and not (first and value.all())):
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op in ("Mul", "Div"):
        return _Affine(value if node.op == "Mul" else 1 / value, zero)
    if node.op == "Add":
        return _Affine(one, value)
    return _Affine(one, -value) if first else _Affine(-one, value)


def _rewrite(graph: Graph, layer: Node, node: Node, source: Tensor, rows: Float64, bias: Float64) -> bool:
    """Set the weights and bias of `layer`, and connect the consumers of `node` to `source`.

    Returns False and changes nothing if they exceed the range of the weight's dtype.
    """
    kind = layer.inputs[1].values.dtype
    with np.errstate(over="ignore"):
        weight, bias = _refold(layer, rows, layer.inputs[1].values.shape).astype(kind), bias.astype(kind)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return False
    _set(graph, layer, 1, weight, "weight")
    if layer.op != "MatMul":
        _set(graph, layer, 2, bias, "bias")
        layer.attrs.pop("beta", None)
    node.inputs = [source]
    surgeon.bypass(graph, node)
    if layer.op == "MatMul" and bias.any():
        offset = surgeon.constant(surgeon.fresh(graph, f"{layer.name}_bias"), bias)
        stem = f"{layer.name}_add_bias"
        surgeon.insert_after(graph, layer.outputs[0], lambda t: surgeon.append(graph, "Add", [t, offset], stem, like=t))
    return True


def _set(graph: Graph, layer: Node, index: int, value: NDArray[Any], stem: str) -> None:
    """Set an input of `layer`: change its initializer in place if nothing else reads it, else add a new one."""
    old = layer.inputs[index] if len(layer.inputs) > index else None
    if isinstance(old, Constant) and len(old.outputs) == 1 and id(old) not in surgeon.exposed(graph):
        old.values = value
        return
    name = old.name if old is not None and old.name else f"{layer.name}_{stem}"
    new = surgeon.constant(surgeon.fresh(graph, name), value)
    layer.inputs = [*layer.inputs[:index], new, *layer.inputs[index + 1 :]]


def _sole_consumer(graph: Graph, tensor: Tensor) -> Node | None:
    """The only consumer of `tensor`, if it is in the main graph and `tensor` is not an output."""
    consumers = list(tensor.outputs)
    if len(consumers) != 1 or id(tensor) in surgeon.exposed(graph):
        return None
    return None if surgeon.in_body(graph, consumers[0]) else consumers[0]


def _weight(layer: Node, ranks: dict[str, int]) -> Float64 | None:
    """The constant weight of a linear layer with channels on axis 1 of input and output; None otherwise."""
    if layer.op not in LAYER_TYPES or not surgeon.standard(layer):
        return None
    if layer.op == "MatMul" and ranks.get(layer.outputs[0].name) != 2:
        return None
    weight = _float64(layer.inputs[1])
    return weight if weight is None or weight.ndim >= 2 else None


def _bias(layer: Node, channels: int) -> Float64 | None:
    """The bias of each channel; None if it is not constant."""
    if layer.op == "MatMul" or len(layer.inputs) < 3 or layer.inputs[2].is_empty():
        return np.zeros(channels)
    bias = _per_channel(layer.inputs[2], channels, rank=2 if layer.op == "Gemm" else 1)
    return None if bias is None else bias * layer.attrs.get("beta", 1.0)


def _per_channel(tensor: Tensor, channels: int, rank: int) -> Float64 | None:
    """A constant that broadcasts to one value per channel, as a vector; channels are on axis 1 (axis 0 if rank 1)."""
    value = _float64(tensor)
    if value is None or value.ndim > rank:
        return None
    if value.size == 1:
        return np.full(channels, value.item())
    axis = value.ndim - rank + min(1, rank - 1)
    return value.reshape(-1) if axis >= 0 and value.shape[axis] == value.size == channels else None


def _float64(tensor: Tensor) -> Float64 | None:
    value = surgeon.values(tensor)
    return None if value is None or value.dtype not in _STORED else value.astype(np.float64)


def _unfold(layer: Node, weight: Float64) -> Float64:
    """Reshape weights to [groups, outputs per group, inputs per group, kernel positions]."""
    groups = layer.attrs.get("group", 1) if layer.op in ("Conv", "ConvTranspose") else 1
    if layer.op == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if layer.op == "ConvTranspose":
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).swapaxes(1, 2)
    return (weight if layer.attrs.get("transB", 0) else weight.T)[None, :, :, None]


def _refold(layer: Node, rows: Float64, shape: tuple[int, ...]) -> Float64:
    if layer.op == "Conv":
        return rows.reshape(shape)
    if layer.op == "ConvTranspose":
        return rows.swapaxes(1, 2).reshape(shape)
    return np.ascontiguousarray(rows[0, :, :, 0] if layer.attrs.get("transB", 0) else rows[0, :, :, 0].T)


def _pads(layer: Node) -> bool:
    """Whether some outputs use only part of the weights, as those at the border of any ConvTranspose do."""
    if layer.op == "Conv":
        return layer.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(layer.attrs.get("pads", []))
    return bool(layer.op == "ConvTranspose")


def _ranks(model: ModelProto) -> dict[str, int]:
    """The ranks of tensors as far as they can be inferred; only MatMul needs them."""
    if all(node.op_type != "MatMul" for node in model.graph.node):
        return {}
    graph = shape_inference.infer_shapes(weights_as_inputs(model, larger_than=1024)).graph
    infos = [i for i in (*graph.value_info, *graph.output) if i.type.tensor_type.HasField("shape")]
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos}
