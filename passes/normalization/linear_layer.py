"""Building blocks for folding what is in front of or behind a linear layer into its weights and bias."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, shape_inference

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor

Float64 = NDArray[np.float64]
_STORED = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64)}


def rewrite(graph: Graph, layer: Node, node: Node, source: Tensor, rows: Float64, bias: Float64) -> bool:
    """Set the weights and bias of `layer`, and connect the consumers of `node` to `source`.

    Returns False and changes nothing if they exceed the range of the weight's dtype.
    """
    kind = layer.inputs[1].values.dtype
    with np.errstate(over="ignore"):
        weight, bias = refold(layer, rows, layer.inputs[1].values.shape).astype(kind), bias.astype(kind)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return False
    set_input(graph, layer, 1, weight, "weight")
    if layer.op != "MatMul":
        set_input(graph, layer, 2, bias, "bias")
        layer.attrs.pop("beta", None)
    node.inputs = [source]
    surgeon.bypass(graph, node)
    if layer.op == "MatMul" and bias.any():
        offset = surgeon.constant(surgeon.fresh(graph, f"{layer.name}_bias"), bias)
        stem = f"{layer.name}_add_bias"
        surgeon.insert_after(graph, layer.outputs[0], lambda t: surgeon.append(graph, "Add", [t, offset], stem, like=t))
    return True


def set_input(graph: Graph, layer: Node, index: int, value: NDArray[Any], stem: str) -> None:
    """Set an input of `layer`: change its initializer in place if nothing else reads it, else add a new one."""
    old = layer.inputs[index] if len(layer.inputs) > index else None
    if isinstance(old, Constant) and len(old.outputs) == 1 and id(old) not in surgeon.exposed(graph):
        old.values = value
        return
    name = old.name if old is not None and old.name else f"{layer.name}_{stem}"
    new = surgeon.constant(surgeon.fresh(graph, name), value)
    layer.inputs = [*layer.inputs[:index], new, *layer.inputs[index + 1 :]]


def sole_consumer(graph: Graph, tensor: Tensor) -> Node | None:
    """The only consumer of `tensor`, if it is in the main graph and `tensor` is not an output."""
    consumers = list(tensor.outputs)
    if len(consumers) != 1 or id(tensor) in surgeon.exposed(graph):
        return None
    return None if surgeon.in_body(graph, consumers[0]) else consumers[0]


def weight_of(layer: Node, ranks: dict[str, int]) -> Float64 | None:
    """The constant weight of a linear layer with channels on axis 1 of input and output; None otherwise."""
    if layer.op not in LAYER_TYPES or not surgeon.standard(layer):
        return None
    if layer.op == "MatMul" and ranks.get(layer.outputs[0].name) != 2:
        return None
    weight = float64(layer.inputs[1])
    return weight if weight is None or weight.ndim >= 2 else None


def bias_of(layer: Node, channels: int) -> Float64 | None:
    """The bias of each channel; None if it is not constant."""
    if layer.op == "MatMul" or len(layer.inputs) < 3 or layer.inputs[2].is_empty():
        return np.zeros(channels)
    bias = per_channel(layer.inputs[2], channels, rank=2 if layer.op == "Gemm" else 1)
    return None if bias is None else bias * layer.attrs.get("beta", 1.0)


def per_channel(tensor: Tensor, channels: int, rank: int) -> Float64 | None:
    """A constant that broadcasts to one value per channel, as a vector; channels are on axis 1 (axis 0 if rank 1)."""
    value = float64(tensor)
    if value is None or value.ndim > rank:
        return None
    if value.size == 1:
        return np.full(channels, value.item())
    axis = value.ndim - rank + min(1, rank - 1)
    return value.reshape(-1) if axis >= 0 and value.shape[axis] == value.size == channels else None


def float64(tensor: Tensor) -> Float64 | None:
    value = surgeon.values(tensor)
    return None if value is None or value.dtype not in _STORED else value.astype(np.float64)


def unfold(layer: Node, weight: Float64) -> Float64:
    """Reshape weights to [groups, outputs per group, inputs per group, kernel positions]."""
    groups = layer.attrs.get("group", 1) if layer.op in ("Conv", "ConvTranspose") else 1
    if layer.op == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if layer.op == "ConvTranspose":
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).swapaxes(1, 2)
    return (weight if layer.attrs.get("transB", 0) else weight.T)[None, :, :, None]


def refold(layer: Node, rows: Float64, shape: tuple[int, ...]) -> Float64:
    if layer.op == "Conv":
        return rows.reshape(shape)
    if layer.op == "ConvTranspose":
        return rows.swapaxes(1, 2).reshape(shape)
    return np.ascontiguousarray(rows[0, :, :, 0] if layer.attrs.get("transB", 0) else rows[0, :, :, 0].T)


def pads(layer: Node) -> bool:
    """Whether some outputs use only part of the weights, as those at the border of any ConvTranspose do."""
    if layer.op == "Conv":
        return layer.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(layer.attrs.get("pads", []))
    return bool(layer.op == "ConvTranspose")


def ranks_of(model: ModelProto) -> dict[str, int]:
    """The ranks of tensors as far as they can be inferred; only MatMul needs them."""
    if all(node.op_type != "MatMul" for node in model.graph.node):
        return {}
    graph = shape_inference.infer_shapes(weights_as_inputs(model, larger_than=1024)).graph
    infos = [i for i in (*graph.value_info, *graph.output) if i.type.tensor_type.HasField("shape")]
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos}
