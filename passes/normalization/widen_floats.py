"""Convert other float types to float32 inside the model; Casts preserve the types of inputs and outputs.

Layers are quantized from float32, and most CPU kernels compute in it anyway.
"""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from rdoq_onnx.model import external
from rdoq_onnx.model.protos import all_names, all_nodes, rename, subgraphs_of
from rdoq_onnx.passes import Pass

_NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_WIDE = TensorProto.DOUBLE
_TYPES = frozenset({"dtype", "output_dtype", "to"})  # attributes that hold a type
_MAX = np.finfo(np.float32).max


@dataclass(frozen=True)
class WidenFloats(Pass):
    """Convert all float16 and bfloat16 tensors to float32, except the model's inputs and outputs, which get a Cast.

    Converts float64 tensors, too, if any input, output or matrix is float64; values beyond float32 saturate. Otherwise
    float64 is there for precise arithmetic, and stays. Assumes that functions are inlined. Leaves models without such
    tensors unchanged.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        kinds = _other_floats(model.graph)
        if not kinds:
            return model
        result = ModelProto()
        result.CopyFrom(model)
        graph = result.graph
        ends = _ends(graph, kinds)
        types = [v.type.tensor_type.elem_type for v in ends]
        _widen(graph, kinds)
        names = _fresh_names([v.name for v in ends], set(all_names(graph)))
        rename(graph.node, names)
        for value, kind in zip(ends, types, strict=True):
            value.type.tensor_type.elem_type = kind
        inputs = [v.name for v in graph.input if v.name in names]
        _add_casts(graph, {names[n]: n for n in inputs}, dict.fromkeys(inputs, TensorProto.FLOAT), first=True)
        outputs = {v.name: k for v, k in zip(ends, types, strict=True) if v.name not in inputs}
        _add_casts(graph, {n: names[n] for n in outputs}, outputs, first=False)
        return result

    def ensures(self, model: ModelProto) -> None:
        """Nothing beyond what `check` verifies."""


def float32_interface(model: ModelProto) -> ModelProto:
    """Change bfloat16 inputs and outputs to float32, as NumPy lacks bfloat16; the inside stays the same.

    Returns `model` itself if it has none.
    """
    if not _ends(model.graph, {TensorProto.BFLOAT16}):
        return model
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    ends = _ends(graph, {TensorProto.BFLOAT16})
    names = _fresh_names([v.name for v in ends], set(all_names(graph)))
    rename(graph.node, names)
    for value in ends:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    inputs = [v.name for v in graph.input if v.name in names]
    _add_casts(graph, {names[n]: n for n in inputs}, dict.fromkeys(inputs, TensorProto.BFLOAT16), first=True)
    outputs = [v.name for v in ends if v.name not in inputs]
    _add_casts(graph, {n: names[n] for n in outputs}, dict.fromkeys(outputs, TensorProto.FLOAT), first=False)
    return result


def _ends(graph: GraphProto, kinds: Set[int]) -> list[ValueInfoProto]:
    """Inputs and outputs of these types, without weights listed as inputs."""
    weights = {t.name for t in graph.initializer}
    return [v for v in (*graph.input, *graph.output) if v.type.tensor_type.elem_type in kinds and v.name not in weights]


def _other_floats(graph: GraphProto) -> Set[int]:
    """The types to convert to float32."""
    attributes = [a for n in all_nodes(graph) for a in n.attribute]
    ends = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)]
    stored = [*graph.initializer, *(a.t for a in attributes if a.HasField("t"))]
    casts = [a.i for a in attributes if a.name in _TYPES and a.type == AttributeProto.INT]
    declared = [v.type.tensor_type.elem_type for v in graph.value_info]
    found = _NARROW & {*ends, *casts, *declared, *(t.data_type for t in stored)}
    matrices = (t.data_type for t in stored if len(t.dims) > 1)
    return found | {_WIDE} if _WIDE in (*ends, *matrices) else found


def _widen(graph: GraphProto, kinds: Set[int]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _widen_type(value.type, kinds)
    for tensor in graph.initializer:
        _widen_tensor(tensor, kinds)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t, kinds)
            if attribute.name in _TYPES and attribute.i in kinds:
                attribute.i = TensorProto.FLOAT
        for inner in subgraphs_of(node):
            _widen(inner, kinds)


def _widen_type(kind: TypeProto, kinds: Set[int]) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in kinds:
        kind.tensor_type.elem_type = TensorProto.FLOAT
    elif kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type, kinds)
    elif kind.HasField("optional_type"):
        _widen_type(kind.optional_type.elem_type, kinds)


def _widen_tensor(tensor: TensorProto, kinds: Set[int]) -> None:
    if tensor.data_type in kinds:
        array = external.values(tensor)
        if tensor.data_type == _WIDE:
            array = np.where(np.isfinite(array), np.clip(array, -_MAX, _MAX), array)
        tensor.CopyFrom(external.stored(array.astype(np.float32), tensor.name))


def _fresh_names(names: list[str], taken: set[str]) -> dict[str, str]:
    fresh = {}
    for name in dict.fromkeys(names):
        fresh[name] = f"{name}_float32"
        while fresh[name] in taken:
            fresh[name] += "_"
        taken.add(fresh[name])
    return fresh


def _add_casts(graph: GraphProto, sources: dict[str, str], kinds: dict[str, int], first: bool) -> None:
    """Add nodes that cast `sources[target]` to each target, before or after all others."""
    casts = [
        helper.make_node("Cast", [source], [target], to=kinds[source if first else target])
        for target, source in sources.items()
    ]
    nodes = [*casts, *graph.node] if first else [*graph.node, *casts]
    del graph.node[:]
    graph.node.extend(nodes)
