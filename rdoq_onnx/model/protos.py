"""Protobuf graphs, read and copied without anything but onnx: names, readers, order of execution."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from rdoq_onnx.errors import ModelError


def live_nodes(nodes: Sequence[NodeProto], order: Iterable[int], read: set[str], keep: set[int]) -> list[int]:
    """Of `order`, what leads to the tensors in `read` or to a node in `keep`."""
    read, live = set(read), []
    for index in reversed(list(order)):
        if index in keep or not read.isdisjoint(nodes[index].output):
            live.append(index)
            read.update(reads([nodes[index]]))
    return live[::-1]


def execution_order(nodes: Sequence[NodeProto]) -> list[int]:
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
                needs = [producer[name] for name in reads([nodes[index]]) if name in producer]
                if any(state[i] == "open" for i in needs):
                    raise ModelError(f"node {nodes[index].name!r} is part of a cycle")
                stack.extend(i for i in reversed(needs) if state[i] == "new")
                continue
            stack.pop()
            if state[index] == "open":
                state[index] = "done"
                order.append(index)
    return order


def reads(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Names that the nodes take from around them: their inputs, and what their subgraphs capture."""
    for node in nodes:
        yield from filter(None, node.input)
        yield from captured(node)


def captured(node: NodeProto) -> Iterator[str]:
    """Names that the bodies of an If, Loop or Scan read from the graph around them."""
    for inner in subgraphs_of(node):
        own = {t.name for t in (*inner.input, *inner.initializer)}
        own.update(t.values.name for t in inner.sparse_initializer)
        own.update(name for n in inner.node for name in n.output)
        yield from (name for name in reads(inner.node) if name not in own)
        yield from (o.name for o in inner.output if o.name not in own)


def subgraphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that `node` has as attributes: the bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and the graphs within it, each before those within it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs_of(node):
            yield from graphs(inner)


def attribute_tensors(node: NodeProto) -> Iterator[TensorProto]:
    """The dense tensors that `node` has as attributes."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def tensors(graph: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Every dense tensor of `graph` and the graphs within it: initializers and attributes."""
    if isinstance(graph, GraphProto):
        yield from graph.initializer
    for node in graph.node:
        yield from attribute_tensors(node)
        for inner in subgraphs_of(node):
            yield from tensors(inner)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of `graph`, each followed by those of its bodies."""
    for node in graph.node:
        yield node
        for inner in subgraphs_of(node):
            yield from all_nodes(inner)


def all_outputs(graph: GraphProto) -> Iterator[ValueInfoProto]:
    """The outputs of `graph` and of the graphs within it."""
    for each in graphs(graph):
        yield from each.output


def all_names(graph: GraphProto) -> Iterator[str]:
    """Every name of a tensor or node in `graph` and the graphs within it."""
    yield from (t.name for t in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
    yield from (t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for inner in subgraphs_of(node):
            yield from all_names(inner)


def rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    """Give tensors that the nodes and their subgraphs read or make the names that `names` has for them."""
    for node in nodes:
        for several in (node.input, node.output):
            for k, name in enumerate(several):
                several[k] = names.get(name, name)
        for inner in subgraphs_of(node):
            rename(inner.node, names)
            for value in (*inner.input, *inner.initializer, *inner.output):
                value.name = names.get(value.name, value.name)


def free_input(name: str, value: NDArray[Any]) -> ValueInfoProto:
    """A graph input of the type and rank of `value`, all of whose sizes are free."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)


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


def default_opset(model: ModelProto) -> int:
    """Version of the standard operators, wherever it stands in the list; 0 if they are not imported."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` with just these outputs, graph inputs among them if named."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {o.name: o for o in model.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(known.get(n, onnx.ValueInfoProto(name=n)) for n in names)
    return copy
