"""The tensors that distortion is measured of: logits rather than what Softmax makes of them."""

from collections.abc import Mapping

import onnx

_SATURATES = frozenset({"Sigmoid", "Softmax"})
_NOT_FLOAT32 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_SPATIAL = frozenset({"Conv", "ConvTranspose", "Resize"})
_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def measured_outputs(model: onnx.ModelProto) -> list[str]:
    """The tensors whose distortion is measured: the outputs of `model`, for a Softmax or Sigmoid what it is made of.

    One that is sure has no slope: around it no perturbation seems to matter, though large ones do. A map of Sigmoids
    (made by a convolution) is measured as it is: some of it is always on the slope, and what becomes of the rest, far
    out, says nothing of the map.
    """
    producer = {o: n for n in model.graph.node for o in n.output}
    names = []
    for output in model.graph.output:
        made = _before_cast(output.name, producer)
        maker = _behind(made, _RESHAPES, producer)
        if maker is None or maker.op_type not in _SATURATES or _is_map(maker, producer):
            names.append(made)
        else:
            names.append(maker.input[0])
    return list(dict.fromkeys(names))


def _behind(tensor: str, passed: frozenset[str], producer: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What makes `tensor`, in front of nodes of the types `passed`."""
    maker = producer.get(tensor)
    while maker is not None and maker.op_type in passed:
        maker = producer.get(maker.input[0])
    return maker


def _is_map(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> bool:
    source = _behind(node.input[0], _RESHAPES | {"Add"}, producer)  # a bias
    return node.op_type == "Sigmoid" and source is not None and source.op_type in _SPATIAL


def _before_cast(output: str, producer: Mapping[str, onnx.NodeProto]) -> str:
    """What an output of another type is cast from (see passes/widen_floats.py); a float32 output itself."""
    maker = producer.get(output)
    cast = maker is not None and maker.op_type == "Cast" and maker.attribute[0].i in _NOT_FLOAT32
    return maker.input[0] if maker is not None and cast else output
