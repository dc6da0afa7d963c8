"""Nodes that stay as they are, and why: nothing is left out silently."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from rdoq_onnx.analysis.patterns import matches, nearest
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.graph import Graph

# What patterns can choose: the type of a node, and the names that it goes by.
Named = tuple[str, tuple[str, ...]]

QUANTIZED = "it is quantized already: its weight comes from a DequantizeLinear, and stays as it is"
INTEGER = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits"})


@dataclass(frozen=True)
class Refusal:
    """Why a weight stays in float; stands in for what was to be found out about it."""

    reason: str


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


@dataclass(frozen=True)
class Excludes:
    """The user's choice of what stays in float: patterns of --exclude, node types of --exclude-op."""

    patterns: tuple[str, ...]
    types: tuple[str, ...]

    def refusal(self, op_type: str, names: Collection[str]) -> Refusal | None:
        """Why a node that goes by `names` is excluded; None if it is not."""
        if op_type in self.types:
            return Refusal("excluded by --exclude-op")
        return Refusal("excluded by --exclude") if any(matches(p, names) for p in self.patterns) else None


def unmatched(excludes: Excludes, nodes: Iterable[Named]) -> Excludes:
    """The patterns and types that fit none of `nodes`."""
    nodes = list(nodes)
    types = {op_type for op_type, _ in nodes}
    return Excludes(
        tuple(p for p in excludes.patterns if not any(matches(p, names) for _, names in nodes)),
        tuple(t for t in excludes.types if t not in types),
    )


def check_excludes(excludes: Excludes, nodes: Collection[Named]) -> None:
    """Raise ConfigError for a pattern or type that fits none of `nodes`."""
    left = unmatched(excludes, nodes)
    for pattern in left.patterns:
        names = [name for _, several in nodes for name in several]
        raise ConfigError(f"--exclude {pattern!r} matches no layer{nearest(pattern, names)}")
    for op_type in left.types:
        types = [op_type for op_type, _ in nodes]
        raise ConfigError(f"--exclude-op {op_type!r} is the type of no layer{nearest(op_type, types)}")


def not_a_matrix(tensor: TensorProto) -> Refusal | None:
    """Why a stored tensor is no float matrix; None if it is one, or a stack of them."""
    if tensor.data_type != TensorProto.FLOAT:
        return Refusal(f"its weight is {TensorProto.DataType.Name(tensor.data_type)}, not FLOAT; export it in float32")
    if len(tensor.dims) < 2:
        return Refusal(f"its weight has {len(tensor.dims)} dimensions, too few for a matrix; reshape it")
    return None


def not_finite(tensor: TensorProto) -> Refusal | None:
    """Refuse a stored tensor with a value that is not finite."""
    if np.isfinite(numpy_helper.to_array(tensor)).all():
        return None
    return Refusal("its weight holds NaN or infinity; train or export it again")
