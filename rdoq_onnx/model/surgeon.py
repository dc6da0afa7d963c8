"""The only adapter between `onnx.ModelProto` and onnx_graphsurgeon.

`edit` imports a model, lets a function change the graph, and grafts the changes onto a copy of the model. It
does without graphsurgeon's exporter, which loses metadata, functions, unused and captured initializers, and
fails on empty or undecodable attributes: what the change left alone is written from its original protobuf.
Weights are not copied for the import, so an edit costs one copy of the model.

Not editable here: function bodies, sparse initializers, the order of the graph inputs that stay.
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

from rdoq_onnx.model.graft import Origin, import_opsets, skeleton, tensor_proto
from rdoq_onnx.model.protos import all_names, copy_fields

__all__ = [
    "Constant", "Graph", "Node", "Tensor", "Variable",
    "append", "bypass", "constant", "edit", "exposed", "freeze", "fresh", "in_body", "insert_after",
    "standard", "values",
]  # fmt: skip

def edit(model: ModelProto, change: Callable[[Graph], None]) -> ModelProto:
    """Apply `change` to the graph of `model` and return the result as a new model; `model` is not altered.

    Drops nodes and initializers that the change made useless, keeps those that were so before, and sorts the
    nodes, as they stood wherever that is an order of execution. New constants become initializers of the main
    graph, also when only a subgraph reads them. `graph.opset`, `import_domains` and `ir_version` are obeyed.
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
    return {id(t) for g in (graph, *graph.bodies) for t in g.outputs}


def in_body(graph: Graph, node: Node) -> bool:
    """Whether `node` belonged to a subgraph when the model was imported."""
    return id(node) in graph.body_nodes


def standard(node: Node) -> bool:
    """Whether `node` is of ONNX's own operators."""
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
    """Add a node with one output; both get fresh names from `stem`, the output gets the type of `like`."""
    output = Variable(fresh(graph, f"{stem}_out"))
    if like is not None:
        output.dtype, output.shape = like.dtype, like.shape
    graph.nodes.append(Node(op, fresh(graph, stem), attrs, list(inputs), [output]))
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

    Returns False, and changes nothing, if that output is the graph's and the input cannot take its name. The node
    stays in `graph.nodes`, without inputs and outputs, until `edit` drops it: to search a long list for each would
    take the square of its length.
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


def _redirect(graph: Graph, old: Tensor, new: Tensor, readers: Iterable[Node]) -> None:
    for node in readers:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
    for inner in graph.bodies:
        inner.outputs = [new if t is old else t for t in inner.outputs]
