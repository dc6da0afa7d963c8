"""Read and copy protobuf graphs with onnx alone: names, consumers, execution order."""

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
    """The indices in `order` of the nodes needed for the tensors in `read` or the nodes in `keep`."""
    read, live = set(read), []
    for index in reversed(list(order)):
        if index in keep or not read.isdisjoint(nodes[index].output):
            live.append(index)
            read.update(reads([nodes[index]]))
    return live[::-1]


def execution_order(nodes: Sequence[NodeProto]) -> list[int]:
    """An execution order that keeps each node's place, or moves it just before its first consumer.

    Iterative, as graphs may be deeper than Python's stack. Raises ModelError on a cycle.
    """
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order: list[int] = []
    state = dict.fromkeys(range(len(nodes)), "new")
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            index = stack[-1]
            if state[index] == "new":
                state[index] = "open"
                producers = [producer[name] for name in reads([nodes[index]]) if name in producer]
                if any(state[i] == "open" for i in producers):
                    raise ModelError(f"node {nodes[index].name!r} is part of a cycle")
                stack.extend(i for i in reversed(producers) if state[i] == "new")
                continue
            stack.pop()
            if state[index] == "open":
                state[index] = "done"
                order.append(index)
    return order


def reads(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Names of the tensors that the nodes read: their inputs, and those their subgraphs capture."""
    for node in nodes:
        yield from filter(None, node.input)
        yield from captured(node)


def captured(node: NodeProto) -> Iterator[str]:
    """Names that the bodies of an If, Loop or Scan read from the enclosing graph."""
    for inner in subgraphs_of(node):
        own = {t.name for t in (*inner.input, *inner.initializer)}
        own.update(t.values.name for t in inner.sparse_initializer)
        own.update(name for n in inner.node for name in n.output)
        yield from (name for name in reads(inner.node) if name not in own)
        yield from (o.name for o in inner.output if o.name not in own)


def subgraphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """The graph attributes of `node`: the bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and all graphs nested in it, in preorder."""
    yield graph
    for node in graph.node:
        for inner in subgraphs_of(node):
            yield from graphs(inner)


def attribute_tensors(node: NodeProto) -> Iterator[TensorProto]:
    """The dense tensors among the attributes of `node`."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def tensors(graph: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Every dense tensor of `graph` and its nested graphs: initializers and attributes."""
    if isinstance(graph, GraphProto):
        yield from graph.initializer
    for node in graph.node:
        yield from attribute_tensors(node)
        for inner in subgraphs_of(node):
            yield from tensors(inner)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of `graph`, each followed by the nodes of its bodies."""
    for node in graph.node:
        yield node
        for inner in subgraphs_of(node):
            yield from all_nodes(inner)


def all_outputs(graph: GraphProto) -> Iterator[ValueInfoProto]:
    """The outputs of `graph` and of its nested graphs."""
    for each in graphs(graph):
        yield from each.output


def all_names(graph: GraphProto) -> Iterator[str]:
    """Every name of a tensor or node in `graph` and its nested graphs."""
    yield from (t.name for t in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
    yield from (t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for inner in subgraphs_of(node):
            yield from all_names(inner)


def rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    """Rename the tensors that the nodes and their subgraphs read or produce, as `names` maps them."""
    for node in nodes:
        for ends in (node.input, node.output):
            for k, name in enumerate(ends):
                ends[k] = names.get(name, name)
        for inner in subgraphs_of(node):
            rename(inner.node, names)
            for value in (*inner.input, *inner.initializer, *inner.output):
                value.name = names.get(value.name, value.name)


def declared(name: str, value: NDArray[Any], sizes: Sequence[int | None]) -> ValueInfoProto:
    """Declare a tensor with the type of `value` and `sizes`, None for those that vary.

    Declare all sizes that are known: from a rank alone, onnx infers a wrong size for Attention of 3-D tensors.
    """
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), sizes)


def common_sizes(shapes: Iterable[tuple[int, ...]]) -> list[int | None]:
    """The sizes that all `shapes`, of one rank, share; None for those that differ."""
    return [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]


def copy_fields(source: Any, target: Any, skip: set[str]) -> None:
    """Copy all protobuf fields but those in `skip`.

    Copying everything and clearing those fields would not free their memory.
    """
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if descriptor.is_repeated:
            getattr(target, descriptor.name).extend(value)
        elif descriptor.message_type:
            getattr(target, descriptor.name).CopyFrom(value)
        else:
            setattr(target, descriptor.name, value)


def without_initializers(model: ModelProto) -> ModelProto:
    """A copy of `model` but for the initializers of its main graph, which are not copied on the way either."""
    result = ModelProto()
    copy_fields(model, result, skip={"graph"})
    copy_fields(model.graph, result.graph, skip={"initializer"})
    return result


def default_opset(model: ModelProto) -> int:
    """Version of the default operator set, wherever in the list it is; 0 if it is not imported."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` with exactly these outputs; `names` may include graph inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    declared = {o.name: o for o in model.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(declared.get(n, onnx.ValueInfoProto(name=n)) for n in names)
    return copy
