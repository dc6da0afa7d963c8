"""Nodes that stay as they are, and why: nothing is left out silently."""

from collections.abc import Iterator
from dataclasses import dataclass

from rdoq_onnx.model.graph import Graph

INTEGER = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits"})


@dataclass(frozen=True)
class Skip:
    """A node left in float, and why."""

    node: str
    op_type: str
    reason: str


def integer_kernels(graph: Graph) -> Iterator[Skip]:
    """Nodes that compute with integers already."""
    for node in graph.nodes:
        if node.op_type in INTEGER:
            yield Skip(node.name, node.op_type, "it is quantized already, and stays as it is")
