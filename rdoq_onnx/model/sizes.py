"""Size of a model in bytes, counted per tensor because protobuf cannot serialize 2 GiB or more."""

import math

from onnx import ModelProto
from onnx.helper import make_tensor_value_info

from rdoq_onnx.model.external import Place
from rdoq_onnx.model.protos import tensors, without_initializers

# The checker serializes the model, which protobuf refuses from 2 GiB on. 64 MiB are left for all that is not tensors.
_SERIALIZABLE = 2**31 - 2**26


def tensor_bytes(model: ModelProto) -> int:
    """Bytes of the stored tensors, without serializing them. External data is not counted."""
    return sum(
        len(t.raw_data)
        + sum(map(len, t.string_data))
        + 4 * (len(t.float_data) + len(t.int32_data))
        + 8 * (len(t.int64_data) + len(t.double_data) + len(t.uint64_data))
        for t in tensors(model.graph)
    )


def model_bytes(model: ModelProto) -> int:
    """Bytes of `model` in a single file, even if protobuf could not write that file."""
    outside = sum(place.length for t in model.graph.initializer if (place := Place.of(t)))
    if serializable(model):
        return int(model.ByteSize()) + outside
    return int(weights_as_inputs(model).ByteSize()) + tensor_bytes(model) + outside


def serializable(model: ModelProto) -> bool:
    """Whether protobuf can serialize `model` as a whole."""
    return tensor_bytes(model) < _SERIALIZABLE


def weights_as_inputs(model: ModelProto, larger_than: int = 0) -> ModelProto:
    """A copy small enough to serialize: initializers of more than `larger_than` elements become graph inputs."""
    result = without_initializers(model)
    inputs = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= larger_than:
            result.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in inputs:
            info = make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            result.graph.input.append(info)
    return result
