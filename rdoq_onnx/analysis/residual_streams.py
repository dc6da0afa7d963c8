"""Residual streams beside narrow activations: an Add reads 8 bits of a tensor that layers read fewer bits of.

Layers get a branch of the tensor (passes/branch_consumers.py), with a quantizer of its own behind the tensor's:

    Add ─ 8 bits ─┬─ next Add
                  └─ fewer bits ─ layers

The budget is that of tensors that layers read, and an integer Add takes 8 bits as fast. Narrow integers in the stream
would round all that earlier blocks have added once more in each block.
"""

from collections.abc import Collection, Iterator, Mapping

from onnx import NodeProto

from rdoq_onnx.analysis.float_consumers import fuses, integer_outputs
from rdoq_onnx.model.graph import SHAPE_OPS, Graph, is_movement
from rdoq_onnx.model.layers import BRANCH


def stream_branches(
    graph: Graph,
    activations: Collection[str],
    quantized: Collection[str],
    readers: Collection[str],
    sums: Mapping[str, str],
) -> dict[str, tuple[str, ...]]:
    """For each of `activations` that other nodes read as integers, too: the consumers that lead to `readers` alone.

    quantized: the tensors that quantizers follow. readers: names of layers and products. sums: as in find_activations.
    """
    integers = _integers(graph, quantized, sums)
    return {t: own for t in activations if t in integers and (own := _leading(t, graph, readers))}


def find_streams(graph: Graph, quantized: Collection[str], sums: Mapping[str, str]) -> list[str]:
    """The tensors that layers read through a branch, and other nodes as integers; quantized: those known so far."""
    found = [*_branched(graph)]
    while True:
        integers = _integers(graph, {*quantized, *found}, sums)
        kept = [t for t in found if t in integers]
        if kept == found:
            return kept
        found = kept


def _branched(graph: Graph) -> Iterator[str]:
    """Yield the tensors with a branch, which is an Identity, or a Mul where the branch's channels are scaled."""
    for node in graph.nodes:
        if node.op_type in ("Identity", "Mul") and node.output[0].startswith(node.input[0] + BRANCH):
            yield node.input[0]


def _integers(graph: Graph, quantized: Collection[str], sums: Mapping[str, str]) -> set[str]:
    """The tensors that an integer kernel makes, and those whose values an Add reads that runs on integers."""
    adds = [n for n in graph.nodes if n.op_type == "Add" and (n.name in sums.values() or fuses(n, graph, quantized))]
    return integer_outputs(graph, quantized) | {graph.root(i) for n in adds for i in n.input}


def _leading(tensor: str, graph: Graph, readers: Collection[str]) -> tuple[str, ...]:
    """The consumers of `tensor` that lead to `readers` alone; none if all do, or if one leads to others as well."""

    def leads(node: NodeProto) -> set[bool]:
        if is_movement(node, graph):
            return {kind for o in node.output for n in graph.consumers.get(o, []) for kind in leads(n)}
        return {node.name in readers}

    kinds = {n.name: leads(n) for n in graph.consumers.get(tensor, []) if n.op_type not in SHAPE_OPS}
    own = tuple(name for name, kind in kinds.items() if kind == {True})
    return own if len(own) < len(kinds) and {True, False} not in kinds.values() else ()
