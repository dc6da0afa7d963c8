"""Graft an edited graphsurgeon graph back onto the protobuf that it was imported from.

graphsurgeon's own exporter loses metadata, functions, and unused and captured initializers, and fails on empty or
undecodable attributes. Here, everything an edit did not touch is written from its original protobuf; only the changes
come from graphsurgeon's objects.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_attribute, make_tensor_value_info, np_dtype_to_tensor_dtype
from onnx_graphsurgeon import Constant, Graph, Node, Tensor
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import external
from rdoq_onnx.model.equality import same_bytes
from rdoq_onnx.model.lazy_values import Stored
from rdoq_onnx.model.protos import all_nodes, copy_fields, execution_order, live_nodes, reads, subgraphs_of

_GRAPH, _GRAPHS, _TENSOR = AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.TENSOR
_NUMBERS = {AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.FLOATS, AttributeProto.INTS}
_TEXTS = {AttributeProto.STRING, AttributeProto.STRINGS}


def skeleton(model: ModelProto) -> ModelProto:
    """The model that graphsurgeon imports: no weights in the main graph, no functions, nothing it fails on."""
    weights = {t.name for t in model.graph.initializer}
    result = ModelProto(ir_version=model.ir_version)
    result.opset_import.extend(model.opset_import)
    copy_fields(model.graph, result.graph, skip={"initializer", "input", "quantization_annotation"})
    result.graph.input.extend(i for i in model.graph.input if i.name not in weights)
    # The name alone makes subgraphs that capture a weight share its tensor; `remember` fills in the values.
    result.graph.value_info.extend(ValueInfoProto(name=name) for name in weights)
    _strip(result.graph)
    return result


def _strip(graph: GraphProto) -> None:
    for info in (*graph.input, *graph.output, *graph.value_info):
        if not info.type.HasField("tensor_type"):
            info.ClearField("type")
    for node in graph.node:
        for index in reversed(range(len(node.attribute))):
            if not _representable(node.attribute[index]):
                del node.attribute[index]
        for inner in subgraphs_of(node):
            _strip(inner)


def _representable(attribute: AttributeProto) -> bool:
    if attribute.type in _TEXTS:
        try:
            return all(text.decode() is not None for text in (attribute.s, *attribute.strings))
        except UnicodeDecodeError:
            return False
    return attribute.type in _NUMBERS or attribute.type in (_GRAPH, _TENSOR)


@dataclass(frozen=True)
class Origin:
    """The protobuf that each imported node and graph came from, and a snapshot of the import before any edit.

    Keys are `id`s because graphsurgeon's objects are not hashable. The first item of each value keeps its key valid.
    """

    taken: set[str]
    nodes: dict[int, tuple[Node, NodeProto, dict[str, Any]]] = field(default_factory=dict)
    graphs: dict[int, tuple[Graph, GraphProto, dict[str, Any]]] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)

    def remember(
        self, graph: Graph, proto: GraphProto, outer: dict[str, Tensor], weights: dict[str, TensorProto]
    ) -> None:
        """Record `graph`, imported from `proto`, and fill in its weights; `outer` holds the tensors it can capture."""
        graph.taken_names = self.taken
        weights = weights | {t.name: t for t in proto.initializer}
        tensors = graph.tensors()
        inputs = {t.name for t in graph.inputs}
        for name in tensors.keys() & (weights.keys() - inputs):
            _fill(tensors[name], weights[name])
        # graphsurgeon creates a new tensor for an output that belongs to an outer graph.
        graph.outputs = [t if t.inputs or t.name in inputs else outer.get(t.name, t) for t in graph.outputs]
        self.graphs[id(graph)] = (graph, proto, {name: _type(t) for name, t in tensors.items()})
        live = set(live_nodes(proto.node, range(len(proto.node)), {o.name for o in proto.output}, keep=set()))
        for index, (node, source) in enumerate(zip(graph.nodes, proto.node, strict=True)):
            before = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
            self.nodes[id(node)] = (node, source, before)
            if index not in live:
                self.dead.add(id(node))
            for attribute in source.attribute:
                if attribute.type == _GRAPH:
                    self.remember(node.attrs[attribute.name], attribute.g, outer | tensors, weights)

    def export(self, graph: Graph, target: GraphProto) -> dict[str, Constant]:
        """Write `graph` to the empty `target`; return the constants that an enclosing graph must provide."""
        _, source, before = self.graphs.get(id(graph), (graph, GraphProto(name=graph.name), {}))
        copy_fields(source, target, skip={"node", "initializer", "input", "output", "value_info"})
        constants: dict[str, Constant] = {}
        nodes = [self._node(node, constants) for node in graph.nodes]
        _collect(constants, graph.outputs)
        keep = {index for index, node in enumerate(graph.nodes) if id(node) in self.dead and node.outputs}
        order = live_nodes(nodes, execution_order(nodes), {t.name for t in graph.outputs}, keep)
        for index in order:
            target.node.add().CopyFrom(nodes[index])
        _write_values(source, target, graph, [graph.nodes[i] for i in order], before)
        read = {*reads(target.node), *(t.name for t in graph.outputs)}
        _write_weights(source, target, constants, read)
        stored = {t.name for t in target.initializer} | {t.values.name for t in target.sparse_initializer}
        missing = read - stored
        return {name: tensor for name, tensor in constants.items() if name in missing}

    def _node(self, node: Node, constants: dict[str, Constant]) -> NodeProto:
        _, source, before = self.nodes.get(id(node), (node, NodeProto(), {}))
        result = NodeProto()
        copy_fields(source, result, skip={"attribute", "input", "output"})
        for name, value in (("op_type", node.op), ("name", node.name), ("domain", node.domain or "")):
            if getattr(result, name) != value:
                setattr(result, name, value)
        result.input.extend(t.name for t in node.inputs)
        result.output.extend(t.name for t in node.outputs)
        _collect(constants, node.inputs)
        old = {a.name: a for a in source.attribute}
        for name in dict.fromkeys((*old, *node.attrs)):
            if name not in node.attrs and name in before:
                continue
            attribute, value = result.attribute.add(), node.attrs.get(name)
            if isinstance(value, Graph):
                attribute.name, attribute.type = name, _GRAPH
                _collect(constants, self.export(value, attribute.g).values())
            elif name not in node.attrs or (name in before and _unchanged(before[name], value)):
                attribute.CopyFrom(old[name])
            else:
                attribute.CopyFrom(_attribute(name, value, old.get(name)))
        return result


def import_opsets(result: ModelProto, graph: Graph, raised: bool) -> None:
    """Import the opsets of `graph`, plus version 1 of every domain that its nodes use but nobody imported."""
    result.opset_import.extend(graph.import_domains)
    default = {"", "ai.onnx"}
    for entry in result.opset_import:
        if raised and entry.domain in default:
            entry.version = graph.opset
    imported = default | {entry.domain for entry in result.opset_import}
    for domain in sorted({node.domain for node in all_nodes(result.graph)} - imported):
        result.opset_import.add(domain=domain, version=1)


def _write_weights(source: GraphProto, target: GraphProto, constants: dict[str, Constant], read: set[str]) -> None:
    """Write the initializers that are still read or never were, except where a node's output now has the name."""
    before = {*reads(source.node), *(o.name for o in source.output)}
    taken = {name for node in target.node for name in node.output}
    for weight in source.initializer:
        if weight.name not in taken and (weight.name in read or weight.name not in before):
            tensor = constants.get(weight.name)
            target.initializer.add().CopyFrom(tensor_proto(tensor, weight) if tensor else weight)


def _write_values(
    source: GraphProto, target: GraphProto, graph: Graph, nodes: Sequence[Node], before: dict[str, Any]
) -> None:
    """Write inputs, outputs and value_info, as in `source` unless a tensor is new or its type changed."""
    declared = {i.name: i for i in (*source.value_info, *source.input, *source.output)}

    def info(tensor: Tensor, old: ValueInfoProto | None) -> ValueInfoProto:
        same = isinstance(tensor, Constant) or before.get(tensor.name) == _type(tensor)
        return old if old is not None and same else _value_info(tensor)

    inputs = {t.name: t for t in graph.inputs}
    weights = {t.name for t in source.initializer}
    for old in source.input:
        if old.name in inputs:
            target.input.append(info(inputs.pop(old.name), old))
        elif old.name in weights:
            target.input.append(old)
    target.input.extend(info(t, declared.get(t.name)) for t in inputs.values())
    target.output.extend(info(t, declared.get(t.name)) for t in graph.outputs)

    computed = {t.name: t for node in nodes for t in node.outputs if t.name}
    gone = {name for node in source.node for name in node.output} - computed.keys()
    for old in source.value_info:
        if old.name in computed:
            target.value_info.append(info(computed[old.name], old))
        elif old.name not in gone:
            target.value_info.append(old)
    listed = {i.name for i in (*source.value_info, *target.output)}
    for name, tensor in computed.items():
        if name not in listed and tensor.dtype is not None and before.get(name) != _type(tensor):
            target.value_info.append(_value_info(tensor))


def _fill(tensor: Tensor, weight: TensorProto) -> None:
    if isinstance(tensor, Constant):
        tensor.values = Stored(weight)
    else:
        tensor.to_constant(Stored(weight))


def _collect(constants: dict[str, Constant], tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if isinstance(tensor, Constant):
            other = constants.setdefault(tensor.name, tensor)
            if other is not tensor and tensor_proto(other) != tensor_proto(tensor):
                raise ModelError(f"two different constants are named {tensor.name!r}")


def tensor_proto(tensor: Constant, original: TensorProto | None = None) -> TensorProto:
    """Convert `tensor` to protobuf; return `original` itself if equal, which keeps its storage and annotations."""
    stored = tensor._values
    if isinstance(stored, LazyValues) and not isinstance(stored, SparseValues):
        if original is not None and (stored.tensor is original or stored.tensor == original):
            return original
        result = TensorProto()
        result.CopyFrom(stored.tensor)
        result.name = tensor.name
        return external.shelved(result)
    array = tensor.values
    if original is not None and same_bytes(external.values(original), array):
        return original
    return external.stored(array, tensor.name)


def _attribute(name: str, value: Any, old: AttributeProto | None) -> AttributeProto:
    if isinstance(value, Tensor):
        result = AttributeProto(name=name, type=_TENSOR)
        same = old is not None and old.type == _TENSOR
        result.t.CopyFrom(tensor_proto(value, old.t if old is not None and same else None))
        return result
    empty = isinstance(value, list) and not value and old is not None
    return make_attribute(name, value, attr_type=old.type if old is not None and empty else None)


def _unchanged(before: Any, value: Any) -> bool:
    return not isinstance(value, Tensor) and type(before) is type(value) and bool(before == value)


def _type(tensor: Tensor) -> Any:
    return None if isinstance(tensor, Constant) else (tensor.dtype, tensor.shape and list(tensor.shape))


def _value_info(tensor: Tensor) -> ValueInfoProto:
    if tensor.dtype is None:
        return ValueInfoProto(name=tensor.name)
    kind = tensor.dtype if isinstance(tensor.dtype, int) else np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return make_tensor_value_info(tensor.name, kind, tensor.shape)
