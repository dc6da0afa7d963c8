"""Bytes of a model, counted tensor by tensor: protobuf serialises nothing of 2 GiB or more."""

import math

from onnx import ModelProto
from onnx.helper import make_tensor_value_info

from rdoq_onnx.model.protos import copy_fields, tensors

# The checker serialises the model, which protobuf refuses from 2 GiB on; what is not tensors is small.
_SERIALISABLE = 2**31 - 2**26


def tensor_bytes(model: ModelProto) -> int:
    """Bytes of the stored tensors, without serialising anything. Data in other files is not counted."""
    return sum(
        len(t.raw_data)
        + sum(map(len, t.string_data))
        + 4 * (len(t.float_data) + len(t.int32_data))
        + 8 * (len(t.int64_data) + len(t.double_data) + len(t.uint64_data))
        for t in tensors(model.graph)
    )


def model_bytes(model: ModelProto) -> int:
    """Bytes of `model` in one file, also where protobuf could not write that file."""
    if serialisable(model):
        return int(model.ByteSize())
    return int(weights_as_inputs(model).ByteSize()) + tensor_bytes(model)


def serialisable(model: ModelProto) -> bool:
    """Whether protobuf can write `model` as a whole."""
    return tensor_bytes(model) < _SERIALISABLE


def weights_as_inputs(model: ModelProto, larger_than: int = 0) -> ModelProto:
    """`model` with initializers of more than so many elements as mere inputs: small enough to serialise."""
    result = ModelProto()
    copy_fields(model, result, skip={"graph"})
    copy_fields(model.graph, result.graph, skip={"initializer"})
    listed = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= larger_than:
            result.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in listed:
            info = make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            result.graph.input.append(info)
    return result
