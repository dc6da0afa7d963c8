"""The only adapter between `onnx.ModelProto` and onnx_graphsurgeon.

`edit` imports a model, lets a function change the graph, and grafts the changes onto a copy of the model. It
does without graphsurgeon's exporter, which loses metadata, functions, unused and captured initializers, and
fails on empty or undecodable attributes: what the change left alone is written from its original protobuf.
Weights are not copied for the import, so an edit costs one copy of the model.

Not editable here: function bodies, sparse initializers, the order of the graph inputs that stay.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_attribute, make_tensor_value_info, np_dtype_to_tensor_dtype
from onnx.numpy_helper import from_array, to_array
from onnx_graphsurgeon import Constant, Graph, Node, Tensor, Variable
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from rdoq_onnx.errors import ModelError

__all__ = [
    "Constant", "Graph", "Node", "Tensor", "Variable",
    "append", "bypass", "constant", "copy_fields", "edit", "exposed", "freeze", "fresh", "insert_after",
    "values",
]  # fmt: skip

_GRAPH, _GRAPHS, _TENSOR = AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.TENSOR
_NUMBERS = {AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.FLOATS, AttributeProto.INTS}
_TEXTS = {AttributeProto.STRING, AttributeProto.STRINGS}


def edit(model: ModelProto, change: Callable[[Graph], None]) -> ModelProto:
    """Apply `change` to the graph of `model` and return the result as a new model; `model` is not altered.

    Drops nodes and initializers that the change made useless, keeps those that were so before, and sorts the
    nodes, as they stood wherever that is an order of execution. New constants become initializers of the main
    graph, also when only a subgraph reads them. `graph.opset`, `import_domains` and `ir_version` are obeyed.
    """
    with G_LOGGER.suppress():
        graph = gs.import_onnx(_skeleton(model))
    origin = _Origin(taken=set(_names(model.graph)))
    origin.remember(graph, model.graph, outer={}, weights={})
    opset = graph.opset
    change(graph)

    result = ModelProto(ir_version=graph.ir_version)
    copy_fields(model, result, skip={"graph", "ir_version", "opset_import"})
    new = origin.export(graph, result.graph)
    for tensor in new.values():
        result.graph.initializer.add().CopyFrom(_tensor_proto(tensor))
    _import_opsets(result, graph, raised=graph.opset != opset)
    return result


# For passes: what graphsurgeon does not have, or does not do within subgraphs.


def fresh(graph: Graph, stem: str) -> str:
    """A name that no tensor or node of the model has, nor any earlier result: `stem`, `stem_1` and so on."""
    name, count = stem, 0
    while name in graph.taken_names:
        count += 1
        name = f"{stem}_{count}"
    graph.taken_names.add(name)
    return name


def constant(name: str, value: NDArray[Any] | TensorProto) -> Constant:
    """An initializer; a TensorProto is stored as it is, which is the way for 2 and 4 bit types."""
    if isinstance(value, np.ndarray):
        return Constant(name, value)
    return Constant(name, LazyValues(value))


def freeze(tensor: Tensor, value: NDArray[Any] | TensorProto | Constant) -> None:
    """Make an initializer of a computed tensor; all that read it keep doing so."""
    if isinstance(value, Constant):
        value = value._values
    tensor.inputs.clear()
    tensor.to_constant(LazyValues(value) if isinstance(value, TensorProto) else value)


def values(tensor: Tensor) -> NDArray[Any] | None:
    """What a constant holds; None for a tensor that is computed, or sparse. Reading it changes nothing."""
    dense = isinstance(tensor, Constant) and not isinstance(tensor._values, SparseValues)
    return tensor.values if dense else None


def exposed(graph: Graph) -> set[int]:
    """`id` of every tensor that is an output of the graph or of a subgraph within it."""
    return {id(t) for g in (graph, *graph.subgraphs(recursive=True)) for t in g.outputs}


def append(
    graph: Graph,
    op: str,
    inputs: Sequence[Tensor],
    stem: str,
    *,
    attrs: dict[str, Any] | None = None,
    like: Tensor | None = None,
    domain: str | None = None,
) -> Variable:
    """Add a node with one output; both get fresh names from `stem`, the output gets the type of `like`."""
    output = Variable(fresh(graph, f"{stem}_out"))
    if like is not None:
        output.dtype, output.shape = like.dtype, like.shape
    graph.nodes.append(Node(op, fresh(graph, stem), attrs, list(inputs), [output], domain))
    return output


def insert_after(graph: Graph, tensor: Tensor, build: Callable[[Tensor], Tensor], *, outputs: bool = True) -> Tensor:
    """Let `build(tensor)` add nodes, and have all that read `tensor` until now read what it returns.

    That includes nodes of subgraphs, and with `outputs` also the graph's output of that name: it keeps its
    name, and `tensor` gets a new one. (A graph input that is an output itself stays that output.)
    """
    readers, stays = list(tensor.outputs), any(tensor is t for t in graph.inputs)
    new = build(tensor)
    if outputs and not stays and any(tensor is t for t in graph.outputs):
        new.name, tensor.name = tensor.name, fresh(graph, tensor.name)
        new.dtype, new.shape = new.dtype or tensor.dtype, new.shape or tensor.shape
        graph.outputs = [new if t is tensor else t for t in graph.outputs]
    _redirect(graph, tensor, new, readers)
    return new


def bypass(graph: Graph, node: Node) -> bool:
    """Remove `node`: what read its first output reads its first input, under the output's name if it has to.

    Returns False, and changes nothing, if that output is the graph's and the input cannot take its name.
    """
    source, result = node.inputs[0], node.outputs[0]
    if any(result is t for t in graph.outputs):
        if not source.inputs or any(source is t for t in graph.outputs):
            return False
        source.name, result.name = result.name, fresh(graph, result.name)
        source.dtype, source.shape = result.dtype, result.shape
        graph.outputs = [source if t is result else t for t in graph.outputs]
    _redirect(graph, result, source, list(result.outputs))
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes = [n for n in graph.nodes if n is not node]
    return True


def _redirect(graph: Graph, old: Tensor, new: Tensor, readers: Iterable[Node]) -> None:
    for node in readers:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    for inner in graph.subgraphs(recursive=True):
        inner.outputs = [new if t is old else t for t in inner.outputs]


# Import.


def _skeleton(model: ModelProto) -> ModelProto:
    """What graphsurgeon gets to see: no weights of the main graph, no functions, nothing that it fails on."""
    weights = {t.name for t in model.graph.initializer}
    result = ModelProto(ir_version=model.ir_version)
    result.opset_import.extend(model.opset_import)
    copy_fields(model.graph, result.graph, skip={"initializer", "input", "quantization_annotation"})
    result.graph.input.extend(i for i in model.graph.input if i.name not in weights)
    # A name is enough to make subgraphs that capture a weight share its tensor; `remember` fills in values.
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
        for inner in _subgraphs(node):
            _strip(inner)


def _representable(attribute: AttributeProto) -> bool:
    if attribute.type in _TEXTS:
        try:
            return all(text.decode() is not None for text in (attribute.s, *attribute.strings))
        except UnicodeDecodeError:
            return False
    return attribute.type in _NUMBERS or attribute.type in (_GRAPH, _TENSOR)


@dataclass(frozen=True)
class _Origin:
    """Which protobuf each imported node and graph came from, and how the imported one looked at first.

    The keys are `id`s: graphsurgeon's objects have no hash. The first item of each value keeps its key valid.
    """

    taken: set[str]
    nodes: dict[int, tuple[Node, NodeProto, dict[str, Any]]] = field(default_factory=dict)
    graphs: dict[int, tuple[Graph, GraphProto, dict[str, Any]]] = field(default_factory=dict)
    useless: set[int] = field(default_factory=set)

    def remember(
        self, graph: Graph, proto: GraphProto, outer: dict[str, Tensor], weights: dict[str, TensorProto]
    ) -> None:
        """Record `graph`, imported from `proto`, and fill in weights; `outer` is what it can capture."""
        graph.taken_names = self.taken
        weights = weights | {t.name: t for t in proto.initializer}
        tensors = graph.tensors()
        inputs = {t.name for t in graph.inputs}
        for name in tensors.keys() & (weights.keys() - inputs):
            _fill(tensors[name], weights[name])
        # graphsurgeon makes a new tensor of an output that belongs to an outer graph.
        graph.outputs = [t if t.inputs or t.name in inputs else outer.get(t.name, t) for t in graph.outputs]
        self.graphs[id(graph)] = (graph, proto, {name: _type(t) for name, t in tensors.items()})
        live = set(_live(proto.node, range(len(proto.node)), {o.name for o in proto.output}, keep=set()))
        for index, (node, source) in enumerate(zip(graph.nodes, proto.node, strict=True)):
            before = {k: list(v) if isinstance(v, list) else v for k, v in node.attrs.items()}
            self.nodes[id(node)] = (node, source, before)
            if index not in live:
                self.useless.add(id(node))
            for attribute in source.attribute:
                if attribute.type == _GRAPH:
                    self.remember(node.attrs[attribute.name], attribute.g, outer | tensors, weights)

    def export(self, graph: Graph, target: GraphProto) -> dict[str, Constant]:
        """Write `graph` to the empty `target`; return the constants that a graph around it has to provide."""
        _, source, before = self.graphs.get(id(graph), (graph, GraphProto(name=graph.name), {}))
        copy_fields(source, target, skip={"node", "initializer", "input", "output", "value_info"})
        constants: dict[str, Constant] = {}
        nodes = [self._node(node, constants) for node in graph.nodes]
        _collect(constants, graph.outputs)
        keep = {index for index, node in enumerate(graph.nodes) if id(node) in self.useless}
        order = _live(nodes, _sorted(nodes), {t.name for t in graph.outputs}, keep)
        for index in order:
            target.node.add().CopyFrom(nodes[index])
        _write_values(source, target, graph, [graph.nodes[i] for i in order], before)
        read = {*_reads(target.node), *(t.name for t in graph.outputs)}
        _write_weights(source, target, constants, read)
        given = {t.name for t in target.initializer} | {t.values.name for t in target.sparse_initializer}
        return {name: tensor for name, tensor in constants.items() if name in read - given}

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


# Export.


def _import_opsets(result: ModelProto, graph: Graph, raised: bool) -> None:
    """As `graph` says, plus the domains of its nodes that nobody imported, at version 1."""
    result.opset_import.extend(graph.import_domains)
    default = {"", "ai.onnx"}
    for entry in result.opset_import:
        if raised and entry.domain in default:
            entry.version = graph.opset
    known = default | {entry.domain for entry in result.opset_import}
    for domain in sorted({node.domain for node in _nodes(result.graph)} - known):
        result.opset_import.add(domain=domain, version=1)


def _write_weights(source: GraphProto, target: GraphProto, constants: dict[str, Constant], read: set[str]) -> None:
    """Initializers that are still read, or never were; not those whose name a node's output now has."""
    before = {*_reads(source.node), *(o.name for o in source.output)}
    taken = {name for node in target.node for name in node.output}
    for weight in source.initializer:
        if weight.name not in taken and (weight.name in read or weight.name not in before):
            tensor = constants.get(weight.name)
            target.initializer.add().CopyFrom(_tensor_proto(tensor, weight) if tensor else weight)


def _write_values(
    source: GraphProto, target: GraphProto, graph: Graph, nodes: Sequence[Node], before: dict[str, Any]
) -> None:
    """Inputs, outputs and value_info: as in `source` unless the tensor is new or its type was changed."""
    known = {i.name: i for i in (*source.value_info, *source.input, *source.output)}

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
    target.input.extend(info(t, known.get(t.name)) for t in inputs.values())
    target.output.extend(info(t, known.get(t.name)) for t in graph.outputs)

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


def _live(nodes: Sequence[NodeProto], order: Iterable[int], read: set[str], keep: set[int]) -> list[int]:
    """Of `order`, what leads to the tensors in `read` or to a node in `keep`."""
    read, live = set(read), []
    for index in reversed(list(order)):
        if index in keep or not read.isdisjoint(nodes[index].output):
            live.append(index)
            read.update(_reads([nodes[index]]))
    return live[::-1]


def _sorted(nodes: Sequence[NodeProto]) -> list[int]:
    """Order of execution: each node where it stood, or just before the first that needs it. No recursion."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order: list[int] = []
    state = dict.fromkeys(range(len(nodes)), "new")
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            index = stack[-1]
            if state[index] == "new":
                state[index] = "open"
                needs = [producer[name] for name in _reads([nodes[index]]) if name in producer]
                if any(state[i] == "open" for i in needs):
                    raise ModelError(f"node {nodes[index].name!r} is part of a cycle")
                stack.extend(i for i in reversed(needs) if state[i] == "new")
                continue
            stack.pop()
            if state[index] == "open":
                state[index] = "done"
                order.append(index)
    return order


def _reads(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Names that the nodes take from around them: their inputs, and what their subgraphs capture."""
    for node in nodes:
        yield from filter(None, node.input)
        for inner in _subgraphs(node):
            own = {t.name for t in (*inner.input, *inner.initializer)}
            own.update(t.values.name for t in inner.sparse_initializer)
            own.update(name for n in inner.node for name in n.output)
            yield from (name for name in _reads(inner.node) if name not in own)
            yield from (o.name for o in inner.output if o.name not in own)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == _GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for inner in _subgraphs(node):
            yield from _nodes(inner)


def _names(graph: GraphProto) -> Iterator[str]:
    """Every name of a tensor or node in `graph` and the graphs within it."""
    yield from (t.name for t in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
    yield from (t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for inner in _subgraphs(node):
            yield from _names(inner)


def _fill(tensor: Tensor, weight: TensorProto) -> None:
    if isinstance(tensor, Constant):
        tensor.values = LazyValues(weight)
    else:
        tensor.to_constant(LazyValues(weight))


def _collect(constants: dict[str, Constant], tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if isinstance(tensor, Constant):
            other = constants.setdefault(tensor.name, tensor)
            if other is not tensor and _tensor_proto(other) != _tensor_proto(tensor):
                raise ModelError(f"two different constants are named {tensor.name!r}")


def _tensor_proto(tensor: Constant, original: TensorProto | None = None) -> TensorProto:
    """`tensor` as protobuf; `original` itself where it says the same, with its storage and annotations."""
    stored = tensor._values
    if isinstance(stored, LazyValues) and not isinstance(stored, SparseValues):
        if original is not None and (stored.tensor is original or stored.tensor == original):
            return original
        result = TensorProto()
        result.CopyFrom(stored.tensor)
        result.name = tensor.name
        return result
    array = tensor.values
    if original is not None:
        old = to_array(original)
        if old.dtype == array.dtype and old.shape == array.shape and old.tobytes() == array.tobytes():
            return original
    return from_array(array, tensor.name)


def _attribute(name: str, value: Any, old: AttributeProto | None) -> AttributeProto:
    if isinstance(value, Tensor):
        result = AttributeProto(name=name, type=_TENSOR)
        same = old is not None and old.type == _TENSOR
        result.t.CopyFrom(_tensor_proto(value, old.t if old is not None and same else None))
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


def copy_fields(source: Any, target: Any, skip: set[str]) -> None:
    """Copy protobuf fields but those in `skip`, whose memory a copy of the whole would never give back."""
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if descriptor.is_repeated:
            getattr(target, descriptor.name).extend(value)
        elif descriptor.message_type:
            getattr(target, descriptor.name).CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)
