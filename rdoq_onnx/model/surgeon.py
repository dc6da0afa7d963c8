"""The only adapter between `onnx.ModelProto` and onnx_graphsurgeon.

`edit` imports a model, lets a function change the graph, and grafts the changes onto a copy of the model. It
avoids graphsurgeon's exporter, which loses metadata, functions, and unused and captured initializers, and fails on
empty or undecodable attributes: everything the change did not touch is written from its original protobuf.
Weights are not copied for the import, so an edit costs one copy of the model.

Cannot be edited: function bodies, sparse initializers, the order of the remaining graph inputs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnx_graphsurgeon import Constant, Graph, Node, Tensor, Variable
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from rdoq_onnx.model.external import Place
from rdoq_onnx.model.graft import Origin, import_opsets, skeleton, tensor_proto
from rdoq_onnx.model.lazy_values import Stored
from rdoq_onnx.model.protos import all_names, copy_fields

__all__ = [
    "Constant",
    "Graph",
    "Node",
    "Tensor",
    "Variable",
    "append",
    "bypass",
    "constant",
    "edit",
    "exposed",
    "freeze",
    "fresh",
    "in_body",
    "insert_after",
    "standard",
    "values",
]


def edit(model: ModelProto, change: Callable[[Graph], None]) -> ModelProto:
    """Apply `change` to the graph of `model` and return the result as a new model; `model` is not altered.

    Drops nodes and initializers that the change left unused, but keeps those that were unused before. Nodes keep
    their order unless execution needs another. New constants become initializers of the main graph, even if only a
    subgraph reads them. Changes to `graph.opset`, `import_domains` and `ir_version` take effect.
    """
    with G_LOGGER.suppress():
        graph = gs.import_onnx(skeleton(model))
        origin = Origin(taken=set(all_names(model.graph)))
        origin.remember(graph, model.graph, outer={}, weights={})
        graph.bodies = [inner for inner, *_ in origin.graphs.values() if inner is not graph]
        graph.body_nodes = {id(node) for inner in graph.bodies for node in inner.nodes}
        opset = graph.opset
        change(graph)

        result = ModelProto(ir_version=graph.ir_version)
        copy_fields(model, result, skip={"graph", "ir_version", "opset_import"})
        new = origin.export(graph, result.graph)
    for tensor in new.values():
        result.graph.initializer.add().CopyFrom(tensor_proto(tensor))
    import_opsets(result, graph, raised=graph.opset != opset)
    return result


# Helpers for passes that graphsurgeon lacks, or that it does not apply within subgraphs.


def fresh(graph: Graph, stem: str) -> str:
    """Reserve a name that no tensor or node of the model has: `stem`, or else `stem_1`, `stem_2`, ..."""
    name, count = stem, 0
    while name in graph.taken_names:
        count += 1
        name = f"{stem}_{count}"
    graph.taken_names.add(name)
    return name


def constant(name: str, value: NDArray[Any] | TensorProto) -> Constant:
    """Create an initializer; a TensorProto is stored unchanged, as 2-bit and 4-bit types require."""
    if isinstance(value, np.ndarray):
        return Constant(name, value)
    return Constant(name, Stored(value))


def freeze(tensor: Tensor, value: NDArray[Any] | TensorProto | Constant) -> None:
    """Turn a computed tensor into an initializer; its consumers stay connected."""
    if isinstance(value, Constant):
        value = value._values
    tensor.inputs.clear()
    tensor.to_constant(Stored(value) if isinstance(value, TensorProto) else value)


def values(tensor: Tensor) -> NDArray[Any] | None:
    """The value of a constant; None for a computed or sparse tensor. Reading it has no side effect."""
    if not isinstance(tensor, Constant) or isinstance(tensor._values, SparseValues):
        return None
    # What is mapped is not kept: its pages would stay in memory.
    mapped = isinstance(tensor._values, LazyValues) and Place.of(tensor._values.tensor) is not None
    value: NDArray[Any] = tensor._values.load() if mapped else tensor.values
    return value


def exposed(graph: Graph) -> set[int]:
    """`id` of every tensor that is an output of the graph or of a nested subgraph."""
    return {id(t) for g in (graph, *graph.bodies) for t in g.outputs}


def all_tensors(graph: Graph) -> dict[str, Tensor]:
    """Return the tensors of the graph and of its bodies, by name."""
    return {name: tensor for g in (*graph.bodies, graph) for name, tensor in g.tensors().items()}


def in_body(graph: Graph, node: Node) -> bool:
    """Whether `node` belonged to a subgraph when the model was imported."""
    return id(node) in graph.body_nodes


def standard(node: Node) -> bool:
    """Whether `node` is a standard ONNX operator."""
    return node.domain in (None, "", "ai.onnx")


def append(
    graph: Graph,
    op: str,
    inputs: Sequence[Tensor],
    stem: str,
    *,
    attrs: dict[str, Any] | None = None,
    like: Tensor | None = None,
) -> Variable:
    """Add a node with one output; both get fresh names from `stem`, and the output the type and shape of `like`."""
    output = Variable(fresh(graph, f"{stem}_out"))
    if like is not None:
        output.dtype, output.shape = like.dtype, like.shape
    graph.nodes.append(Node(op, fresh(graph, stem), attrs, list(inputs), [output]))
    return output


def insert_after(graph: Graph, tensor: Tensor, build: Callable[[Tensor], Tensor], *, outputs: bool = True) -> Tensor:
    """Let `build(tensor)` add nodes, and redirect all previous consumers of `tensor` to the tensor it returns.

    That includes consumers in subgraphs and, with `outputs`, the graph output: it keeps its name, and `tensor` gets a
    new one. (A graph input that is also an output stays that output.)
    """
    consumers, is_input = list(tensor.outputs), any(tensor is t for t in graph.inputs)
    new = build(tensor)
    if outputs and not is_input and any(tensor is t for t in graph.outputs):
        new.name, tensor.name = tensor.name, fresh(graph, tensor.name)
        new.dtype, new.shape = new.dtype or tensor.dtype, new.shape or tensor.shape
        graph.outputs = [new if t is tensor else t for t in graph.outputs]
    _redirect(graph, tensor, new, consumers)
    return new


def bypass(graph: Graph, node: Node) -> bool:
    """Remove `node`: connect the consumers of its first output to its first input.

    If that output is a graph output, the input takes its name; where it cannot, returns False and changes nothing.
    The node stays in `graph.nodes`, without inputs and outputs, until `edit` drops it: removing nodes one by one from
    a list would take quadratic time.
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
    return True


def _redirect(graph: Graph, old: Tensor, new: Tensor, consumers: Iterable[Node]) -> None:
    for node in consumers:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    for inner in graph.bodies:
        inner.outputs = [new if t is old else t for t in inner.outputs]
