"""What a model from anywhere must be before anything is computed from it.

The checks of onnx leave out what would end in a traceback, or in all memory, further on. Each looks at declarations
alone, in time that grows with the number of nodes.
"""

import math
from collections import Counter
from collections.abc import Iterator

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.protos import attribute_tensors, subgraphs_of
from rdoq_onnx.model.sizes import weights_as_inputs

DEEPEST = 16  # graphs within graphs; exporters stay under 8
LARGEST = 2**33  # bytes of one tensor, for one sample where the model leaves its batch free
_INFERABLE = 1024  # elements of a constant that shape inference may look at
_PACKED: dict[int, int] = {  # types of less than a byte, with how many share one
    getattr(TensorProto, name): count
    for name, count in {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "INT2": 4, "UINT2": 4}.items()
    if hasattr(TensorProto, name)  # as far as this release of onnx has them
}


def check_model(model: ModelProto) -> None:
    """Raise ModelError unless graphs are nested to a sane depth, and tensors have their own names and data."""
    for graph, depth in _graphs(model.graph, 1):
        if depth > DEEPEST:
            raise ModelError(f"graphs are nested over {DEEPEST} deep (graph {graph.name!r}); export it flatter")
        stored = Counter(t.name for t in graph.initializer)
        if len(stored) < len(graph.initializer):
            name = next(n for n, count in stored.items() if count > 1)
            raise ModelError(f"two initializers are named {name!r}; export the model again")
        for tensor in graph.initializer:
            _check_tensor(tensor)
        for node in graph.node:
            for tensor in attribute_tensors(node):
                _check_tensor(tensor)
    constant = {t.name for t in model.graph.initializer}
    for value in model.graph.output:
        if value.name in constant:
            raise ModelError(f"output {value.name!r} is a stored constant, not computed; remove it from the outputs")


def check_sizes(model: ModelProto) -> None:
    """Raise ModelError if a tensor would be absurdly large, as far as shapes can be inferred."""
    free = weights_as_inputs(model, larger_than=_INFERABLE)
    single = onnx.ModelProto()
    single.CopyFrom(free)
    for value in single.graph.input:  # what depends on a free size cannot be inferred otherwise
        for size in value.type.tensor_type.shape.dim:
            size.dim_value = size.dim_value or 1
    _check_inferred(free)
    _check_inferred(single)


def _check_inferred(model: ModelProto) -> None:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # it gives up on many a model that runs
        return
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        size = math.prod(max(d.dim_value, 1) for d in kind.shape.dim) * 4
        if size > LARGEST:
            raise ModelError(f"tensor {value.name!r} would take {size / 2**30:,.0f} GB; check the sizes that it has")


def _graphs(graph: GraphProto, depth: int) -> Iterator[tuple[GraphProto, int]]:
    """As `protos.graphs`, with depths; what is nested too deep is not walked further."""
    yield graph, depth
    if depth <= DEEPEST:
        for node in graph.node:
            for inner in subgraphs_of(node):
                yield from _graphs(inner, depth + 1)


def _check_tensor(tensor: TensorProto) -> None:
    """Raise ModelError unless the tensor's data are as many as its shape says."""
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has a negative dimension, {list(tensor.dims)}; export it again")
    if tensor.data_type == TensorProto.STRING:
        found, wanted = len(tensor.string_data), count
    elif tensor.HasField("raw_data"):
        packed = _PACKED.get(tensor.data_type)
        each = 1 if packed else helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        found, wanted = len(tensor.raw_data), -(-count // packed) if packed else count * each
    elif tensor.data_type in _PACKED:
        return
    else:
        parts = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        field = helper.tensor_dtype_to_field(tensor.data_type)
        found, wanted = len(getattr(tensor, field)), count * parts
    if found != wanted:
        shape = "x".join(map(str, tensor.dims)) or "a scalar"
        raise ModelError(f"tensor {tensor.name!r} is {shape}, but holds other data; export or download the model again")
