"""Weights that no layer of the main graph applies, and why they stay as they are: nothing is left out silently."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import GraphProto, NodeProto, TensorProto

from rdoq_onnx.graph import Graph
from rdoq_onnx.protos import subgraphs_of

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
INTEGER = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits"})
_TABLE = 1024  # elements of an embedding; smaller tables are shape arithmetic
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


@dataclass(frozen=True)
class Skip:
    """A node left in float, and why."""

    node: str
    op_type: str
    reason: str


def other_weights(graph: Graph, layer_types: tuple[str, ...]) -> Iterator[Skip]:
    """Nodes with weights that are no layers: embeddings, recurrent cells, integer kernels, layers in subgraphs."""
    for node in graph.nodes:
        reason = _reason(node, graph)
        if reason:
            yield Skip(node.name, node.op_type, reason)
        for inner in subgraphs_of(node):
            for nested in _nested(inner, layer_types):
                where = f"it is in the body of {node.op_type} {node.name!r}, and only the main graph is quantized"
                yield Skip(nested.name or nested.output[0], nested.op_type, f"{where}; export the body inline")


def _reason(node: NodeProto, graph: Graph) -> str:
    if node.op_type in INTEGER:
        return "it is quantized already, and stays as it is"
    stored = [graph.initializers[i] for i in node.input if i in graph.initializers]
    if node.op_type in RECURRENT and any(_is_weight(t) for t in stored):
        return "weights of recurrent cells stay in float"
    if node.op_type == "Gather" and node.input[0] in graph.initializers:
        table = graph.initializers[node.input[0]]
        if _is_weight(table) and math.prod(table.dims) >= _TABLE:
            return "embedding tables stay in float"
    return ""


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in _FLOATS and len(tensor.dims) > 1


def _nested(graph: GraphProto, layer_types: tuple[str, ...]) -> Iterator[NodeProto]:
    for node in graph.node:
        if node.domain in ("", "ai.onnx") and (node.op_type in layer_types or node.op_type in RECURRENT):
            yield node
        for inner in subgraphs_of(node):
            yield from _nested(inner, layer_types)
