"""Tensors at which distortion is measured: logits in place of a Softmax."""

from collections.abc import Mapping

import onnx

_SATURATES = frozenset({"Sigmoid", "Softmax"})
_NOT_FLOAT32 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_SPATIAL = frozenset({"Conv", "ConvTranspose", "Resize"})
_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def measured_outputs(model: onnx.ModelProto) -> list[str]:
    """Return the tensors to measure: the outputs of `model`, but the input of a final Softmax or Sigmoid.

    A saturated Softmax has a vanishing gradient: no small perturbation seems to matter, though large ones do. A map of
    Sigmoids (produced by a convolution) is measured itself: part of it is never saturated, and errors of logits far out
    in saturation say nothing about the map.
    """
    producers = {o: n for n in model.graph.node for o in n.output}
    names = []
    for output in model.graph.output:
        tensor = _before_cast(output.name, producers)
        producer = _producer(tensor, _RESHAPES, producers)
        if producer is None or producer.op_type not in _SATURATES or _is_map(producer, producers):
            names.append(tensor)
        else:
            names.append(producer.input[0])
    return list(dict.fromkeys(names))


def _producer(tensor: str, skipped: frozenset[str], producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """Return the producer of `tensor`, looking through nodes of the types `skipped`."""
    node = producers.get(tensor)
    while node is not None and node.op_type in skipped:
        node = producers.get(node.input[0])
    return node


def _is_map(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    source = _producer(node.input[0], _RESHAPES | {"Add"}, producers)  # an Add may be a bias
    return node.op_type == "Sigmoid" and source is not None and source.op_type in _SPATIAL


def _before_cast(output: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """Return what `output` is cast from (see passes/normalization/widen_floats.py), or `output` if it is float32."""
    node = producers.get(output)
    cast = node is not None and node.op_type == "Cast" and node.attribute[0].i in _NOT_FLOAT32
    return node.input[0] if node is not None and cast else output
