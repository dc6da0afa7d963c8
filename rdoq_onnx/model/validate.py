"""Validate an untrusted model before anything is computed from it.

onnx's own checks miss defects that would later end in a traceback or exhaust memory. These checks read declarations
only, in time linear in the number of nodes.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.external import Place
from rdoq_onnx.model.protos import attribute_tensors, default_opset, subgraphs_of
from rdoq_onnx.model.sizes import weights_as_inputs

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's operators
MAX_NESTING = 16  # levels of nested graphs; exporters stay under 8
MAX_BYTES = 2**33  # bytes of one tensor, for a batch of 1 where the model leaves it free
_ADDED = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})  # the former is the standard's from 17 on
_BLOCKED = "com.microsoft.nchwc"  # weights in blocks of channels, as many as fit a register
_INFERABLE = 1024  # elements: shape inference sees no larger constants
_PACKED: dict[int, int] = {  # sub-byte types: elements per byte
    getattr(TensorProto, name): count
    for name, count in {"INT4": 2, "UINT4": 2, "FLOAT4E2M1": 2, "INT2": 4, "UINT2": 4}.items()
    if hasattr(TensorProto, name)  # older releases of onnx lack some
}


def check_model(model: ModelProto) -> None:
    """Raise ModelError for what no step can handle.

    Graphs nested too deep, names that clash, tensors whose data does not match their shape, and layouts that only ONNX
    Runtime's processor at hand understands.
    """
    for graph, depth in _graphs(model.graph, 1):
        if depth > MAX_NESTING:
            raise ModelError(
                f"graph {graph.name!r} is nested over {MAX_NESTING} levels deep; export the model with fewer levels"
            )
        stored = Counter(t.name for t in graph.initializer)
        if len(stored) < len(graph.initializer):
            name = next(n for n, count in stored.items() if count > 1)
            raise ModelError(f"two initializers are named {name!r}; export the model again")
        for tensor in graph.initializer:
            _check_tensor(tensor)
        for node in graph.node:
            if node.domain == _BLOCKED:
                raise ModelError(
                    f"{node.op_type} {node.name!r} is of the domain {_BLOCKED}: the model was saved by ONNX Runtime at "
                    "its highest optimization level; save it at the basic or extended level, or export it again"
                )
            for tensor in attribute_tensors(node):
                _check_tensor(tensor)
    constant = {t.name for t in model.graph.initializer}
    for value in model.graph.output:
        if value.name in constant:
            raise ModelError(f"output {value.name!r} is a constant initializer; remove it from the outputs")


def check_sizes(model: ModelProto) -> None:
    """Raise ModelError if a tensor would exceed MAX_BYTES, as far as shapes can be inferred."""
    free = weights_as_inputs(model, larger_than=_INFERABLE)
    single = onnx.ModelProto()
    single.CopyFrom(free)
    for value in single.graph.input:  # sizes derived from a free one cannot be inferred otherwise
        for size in value.type.tensor_type.shape.dim:
            size.dim_value = size.dim_value or 1
    _check_inferred(free)
    _check_inferred(single)


def _check_inferred(model: ModelProto) -> None:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # it rejects many models that run
        return
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        size = math.prod(max(d.dim_value, 1) for d in kind.shape.dim) * 4
        if size > MAX_BYTES:
            raise ModelError(f"tensor {value.name!r} would take {size / 2**30:,.0f} GB; check its dimensions")


def set_apart(model: ModelProto) -> ModelProto:
    """Give operators that ONNX Runtime adds to the standard's domain its own, for onnx's checker, which rejects them.

    Returns `model` itself if it has none.
    """
    added = _ADDED if default_opset(model) < 17 else _ADDED - {"LayerNormalization"}
    if not any(n.op_type in added and n.domain in ("", "ai.onnx") for n in model.graph.node):
        return model
    result = ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if node.op_type in added and node.domain in ("", "ai.onnx"):
            node.domain = MICROSOFT
    if all(o.domain != MICROSOFT for o in result.opset_import):
        result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return result


def _graphs(graph: GraphProto, depth: int) -> Iterator[tuple[GraphProto, int]]:
    """As `protos.graphs`, with depths; stops below MAX_NESTING."""
    yield graph, depth
    if depth <= MAX_NESTING:
        for node in graph.node:
            for inner in subgraphs_of(node):
                yield from _graphs(inner, depth + 1)


def _check_tensor(tensor: TensorProto) -> None:
    """Raise ModelError unless the tensor has as much data as its shape requires."""
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has a negative dimension: {list(tensor.dims)}; export it again")
    if tensor.data_type == TensorProto.STRING:
        actual, expected = len(tensor.string_data), count
    elif tensor.HasField("raw_data") or Place.of(tensor):
        packed = _PACKED.get(tensor.data_type)
        each = 1 if packed else helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        place = Place.of(tensor)
        if place and not Path(place.path).is_absolute():
            found = f"the values of tensor {tensor.name!r} are in the file {place.path!r}, which is not loaded"
            raise ModelError(f"{found}; give the path of the model, or load it with its external data")
        actual = place.length if place else len(tensor.raw_data)
        expected = -(-count // packed) if packed else count * each
    elif tensor.data_type in _PACKED:
        return
    else:
        parts = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        field = helper.tensor_dtype_to_field(tensor.data_type)
        actual, expected = len(getattr(tensor, field)), count * parts
    if actual != expected:
        shape = f"of shape {list(tensor.dims)}" if tensor.dims else "a scalar"
        raise ModelError(
            f"tensor {tensor.name!r} is {shape}, but its data has another size; export or download the model again"
        )
