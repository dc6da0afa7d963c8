"""float16 and bfloat16 models in float32, inside: inputs and outputs keep their types behind a Cast.

Layers are quantized from float32, and most CPU kernels compute in it anyway.
"""

from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from rdoq_onnx.passes import Pass
from rdoq_onnx.protos import all_names, all_nodes, subgraphs_of

_NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_TYPES = frozenset({"dtype", "output_dtype", "to"})  # attributes that name a type


@dataclass(frozen=True)
class WidenFloats(Pass):
    """Make float32 of all float16 and bfloat16 tensors but the model's inputs and outputs, which get a Cast.

    Assumes that functions are inlined. Leaves models without such tensors as they are.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        if not _has_narrow(model.graph):
            return model
        result = ModelProto()
        result.CopyFrom(model)
        graph = result.graph
        weights = {t.name for t in graph.initializer}
        ends = [v for v in (*graph.input, *graph.output)
                if v.type.tensor_type.elem_type in _NARROW and v.name not in weights]  # fmt: skip
        kinds = [v.type.tensor_type.elem_type for v in ends]
        _widen(graph)
        names = _fresh_names([v.name for v in ends], set(all_names(graph)))
        _rename(graph.node, names)
        for value, kind in zip(ends, kinds, strict=True):
            value.type.tensor_type.elem_type = kind
        inputs = [v.name for v in graph.input if v.name in names]
        _add_casts(graph, {names[n]: n for n in inputs}, dict.fromkeys(inputs, TensorProto.FLOAT), first=True)
        outputs = {v.name: k for v, k in zip(ends, kinds, strict=True) if v.name not in inputs}
        _add_casts(graph, {n: names[n] for n in outputs}, outputs, first=False)
        return result

    def ensures(self, model: ModelProto) -> None:
        """Nothing that `check` does not see."""


def _has_narrow(graph: GraphProto) -> bool:
    declared = [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)]
    stored = [t.data_type for t in graph.initializer]
    attributes = [a for n in all_nodes(graph) for a in n.attribute]
    cast = [a.i for a in attributes if a.name in _TYPES and a.type == AttributeProto.INT]
    return not _NARROW.isdisjoint([*declared, *stored, *cast, *(a.t.data_type for a in attributes if a.HasField("t"))])


def _widen(graph: GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _widen_type(value.type)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            if attribute.name in _TYPES and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
        for inner in subgraphs_of(node):
            _widen(inner)


def _widen_type(kind: TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in _NARROW:
        kind.tensor_type.elem_type = TensorProto.FLOAT
    elif kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _widen_type(kind.optional_type.elem_type)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _fresh_names(names: list[str], taken: set[str]) -> dict[str, str]:
    fresh = {}
    for name in dict.fromkeys(names):
        fresh[name] = f"{name}_float32"
        while fresh[name] in taken:
            fresh[name] += "_"
        taken.add(fresh[name])
    return fresh


def _rename(nodes: "list[NodeProto]", names: dict[str, str]) -> None:
    for node in nodes:
        for several in (node.input, node.output):
            for k, name in enumerate(several):
                several[k] = names.get(name, name)
        for inner in subgraphs_of(node):
            _rename(inner.node, names)
            for value in inner.output:
                value.name = names.get(value.name, value.name)


def _add_casts(graph: GraphProto, sources: dict[str, str], kinds: dict[str, int], first: bool) -> None:
    """Nodes that cast `sources[target]` to each target, before or behind all others."""
    casts = [
        helper.make_node("Cast", [source], [target], to=kinds[source if first else target])
        for target, source in sources.items()
    ]
    nodes = [*casts, *graph.node] if first else [*graph.node, *casts]
    del graph.node[:]
    graph.node.extend(nodes)
