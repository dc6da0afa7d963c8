"""Whether two models are equal, wherever the values of their tensors are."""

import numpy as np
from onnx import ModelProto, TensorProto

from rdoq_onnx.model.external import Place, values
from rdoq_onnx.model.protos import copy_fields


def same(one: ModelProto, other: ModelProto) -> bool:
    """Whether two models are equal, wherever their values are."""
    mine, theirs = one.graph.initializer, other.graph.initializer
    return (
        len(mine) == len(theirs)
        and _without_tensors(one) == _without_tensors(other)
        and all(_same_tensor(a, b) for a, b in zip(mine, theirs, strict=True))
    )


def _without_tensors(model: ModelProto) -> ModelProto:
    result = ModelProto()
    copy_fields(model, result, skip={"graph"})
    copy_fields(model.graph, result.graph, skip={"initializer"})
    return result


def _same_tensor(one: TensorProto, other: TensorProto) -> bool:
    if Place.of(one) == Place.of(other):
        return one == other
    if (one.name, one.data_type, one.dims) != (other.name, other.data_type, other.dims):
        return False
    mine, theirs = (np.ascontiguousarray(values(t)).reshape(-1).view(np.uint8) for t in (one, other))
    return np.array_equal(mine, theirs)
