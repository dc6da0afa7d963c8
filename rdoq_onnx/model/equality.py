"""Whether models, tensors or arrays are equal, wherever the values of their tensors are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from rdoq_onnx.model.external import Place, values
from rdoq_onnx.model.protos import without_initializers


def same(one: ModelProto, other: ModelProto) -> bool:
    """Whether two models are equal, wherever their values are."""
    mine, theirs = one.graph.initializer, other.graph.initializer
    return (
        len(mine) == len(theirs)
        and without_initializers(one) == without_initializers(other)
        and all(_same_tensor(a, b) for a, b in zip(mine, theirs, strict=True))
    )


def _same_tensor(one: TensorProto, other: TensorProto) -> bool:
    if Place.of(one) == Place.of(other):
        return one == other
    named = (one.name, one.data_type) == (other.name, other.data_type)
    return named and same_bytes(values(one), values(other))


def same_bytes(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays are equal bit by bit, in type and shape too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    mine, theirs = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other))
    return bool(np.array_equal(mine, theirs))
