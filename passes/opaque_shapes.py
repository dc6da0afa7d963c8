"""Keep OpenVINO from reading shapes at quantized convolutions.

    x ─ Shape ─ Mul by 1 ─ Gather, Slice, ...

OpenVINO (2026.4) imports the bias of a Conv as Conv ─ Add. A Shape of any tensor whose dimensions are those of the Conv
is then computed from the Conv alone, in front of its Add, as if it were the nearest source. The Add has no fused kernel
any more; its CPU plugin merges it into the quantizer behind it, with the first channel's bias for all channels. A
product is no known dimension, so it stays where it is. ONNX Runtime multiplies a few integers.
"""

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Graph, Node, Tensor
from rdoq_onnx.passes import Pass

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_SAME_VALUE = ("Cast", "Identity", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class OpaqueShapes(Pass):
    """Multiply shapes by 1 if the model has a convolution with a bias in front of a quantizer.

    Leaves a batch size that only starts the shape of a Reshape: OpenVINO replaces it by a constant.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        def change(graph: Graph) -> None:
            found = [n for n in graph.nodes if n.op == "Shape" and surgeon.standard(n) and not _batch_only(n)]
            if not found or not any(map(_quantized_with_bias, graph.nodes)):
                return
            one = surgeon.constant(surgeon.fresh(graph, "shape_factor"), np.array(1, np.int64))
            for node in found:
                shape = node.outputs[0]
                surgeon.insert_after(
                    graph, shape, lambda t: surgeon.append(graph, "Mul", [t, one], f"{t.name}_Mul", like=t)
                )

        return surgeon.edit(model, change)


def _quantized_with_bias(node: Node) -> bool:
    if node.op not in _CONVOLUTIONS or len(node.inputs) < 3 or not node.inputs[2].name:
        return False
    return any(consumer.op == "QuantizeLinear" for consumer in node.outputs[0].outputs)


def _batch_only(shape: Node) -> bool:
    """Whether nothing but the first dimension is read, and only as the first of a Reshape's shape."""
    (result,) = shape.outputs
    return bool(result.outputs) and all(_first_only(n) and _starts_reshapes(n.outputs[0]) for n in result.outputs)


def _first_only(node: Node) -> bool:
    """Whether `node` takes element 0 out of a shape."""
    if node.op == "Gather":
        return not np.any(_given(node, 1, 1))
    if node.op != "Slice" or len(node.inputs) < 3:
        return False
    return np.array_equal(_given(node, 1, 1), [0]) and np.array_equal(_given(node, 2, 0), [1])


def _given(node: Node, index: int, otherwise: int) -> object:
    """Return the constant input `index` of `node`, `otherwise` if it is computed."""
    value = surgeon.values(node.inputs[index])
    return otherwise if value is None else value


def _starts_reshapes(size: Tensor) -> bool:
    """Whether `size`, an element of a shape, only becomes the first one of the shape of a Reshape."""
    return bool(size.outputs) and all(_starts_reshape(node, size) for node in size.outputs)


def _starts_reshape(node: Node, size: Tensor) -> bool:
    if node.op in _SAME_VALUE:
        return _starts_reshapes(node.outputs[0])
    if node.op == "Concat":
        rest = node.inputs[1:]
        first = node.inputs[0] is size and all(surgeon.values(t) is not None for t in rest)
        consumers = node.outputs[0].outputs
        return first and bool(consumers) and all(n.op == "Reshape" for n in consumers)
    return False
