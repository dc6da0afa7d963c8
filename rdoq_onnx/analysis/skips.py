"""Nodes that stay unchanged, and why: nothing is skipped silently."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from onnx import TensorProto

from rdoq_onnx.analysis.patterns import matches, nearest, suggestion
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model import external
from rdoq_onnx.model.graph import Graph

# What patterns can select: a node's operator type and its names.
Named = tuple[str, tuple[str, ...]]

SLOWER = "integers are predicted to take longer here"
QUANTIZED = "it is already quantized: its weight comes from a DequantizeLinear, and stays as it is"
INTEGER = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm"})
INTEGER |= {"GatherBlockQuantized", "MatMulNBits"}


@dataclass(frozen=True)
class Refusal:
    """Why a weight stays in float; returned in place of the weight."""

    reason: str


@dataclass(frozen=True)
class Skip:
    """A node left in float, and why."""

    node: str
    op_type: str
    reason: str


_ATTENTION = frozenset({"GroupQueryAttention", "MultiHeadAttention"})

Finiteness = Callable[[TensorProto], Refusal | None]  # refuses an initializer with NaN or infinite values


def integer_kernels(graph: Graph) -> Iterator[Skip]:
    """Nodes that already compute on integers."""
    for node in graph.nodes:
        if node.op_type in INTEGER:
            yield Skip(node.name, node.op_type, "it is already quantized, and stays as it is")


def fused_attention(graph: Graph) -> Iterator[Skip]:
    """Nodes that multiply activations inside, as passes/unfusing has not written them out."""
    for node in graph.nodes:
        if node.op_type in _ATTENTION or (node.op_type == "Attention" and node.domain in ("", "ai.onnx")):
            yield Skip(node.name, node.op_type, "both factors of its products are computed, inside one operator")


@dataclass(frozen=True)
class Excludes:
    """What the user keeps in float: patterns of --exclude, operator types of --exclude-op."""

    patterns: tuple[str, ...]
    types: tuple[str, ...]

    def refusal(self, op_type: str, names: Collection[str]) -> Refusal | None:
        """Why a node with these `names` is excluded; None if it is not."""
        if op_type in self.types:
            return Refusal("excluded by --exclude-op")
        return Refusal("excluded by --exclude") if any(matches(p, names) for p in self.patterns) else None


def unmatched(excludes: Excludes, nodes: Iterable[Named]) -> Excludes:
    """The patterns and types that match none of `nodes`."""
    nodes = list(nodes)
    types = {op_type for op_type, _ in nodes}
    return Excludes(
        tuple(p for p in excludes.patterns if not any(matches(p, names) for _, names in nodes)),
        tuple(t for t in excludes.types if t not in types),
    )


def check_excludes(excludes: Excludes, nodes: Collection[Named]) -> None:
    """Raise ConfigError for a pattern or type that matches none of `nodes`."""
    left = unmatched(excludes, nodes)
    for pattern in left.patterns:
        names = [name for _, aliases in nodes for name in aliases]
        raise ConfigError(f"--exclude {pattern!r} matches no layer{suggestion(pattern, names)}")
    for op_type in left.types:
        types = [op_type for op_type, _ in nodes]
        raise ConfigError(f"--exclude-op {op_type!r} matches no layer's operator type{nearest(op_type, types)}")


def not_a_matrix(tensor: TensorProto) -> Refusal | None:
    """Why an initializer is not a float matrix; None if it is one, or a stack of them."""
    if tensor.data_type != TensorProto.FLOAT:
        return Refusal(f"its weight is {TensorProto.DataType.Name(tensor.data_type)}, not FLOAT; export it as float32")
    if len(tensor.dims) < 2:
        return Refusal(f"its weight has {len(tensor.dims)} dimensions, too few for a matrix; reshape it")
    return None


def not_finite(tensor: TensorProto) -> Refusal | None:
    """Refuse an initializer with NaN or infinite values."""
    place = external.Place.of(tensor)
    finite = np.isfinite(external.values(tensor)).all() if place is None else _finite(place, tensor.data_type)
    if finite:
        return None
    return Refusal("its weight holds NaN or infinity; train or export it again")


def presumed_finite(tensor: TensorProto) -> Refusal | None:
    """Refuse as `not_finite` does, but presume detached tensors finite: nothing of them is read."""
    return None if external.Place.of(tensor) else not_finite(tensor)


@cache
def _finite(place: external.Place, data_type: int) -> bool:
    """Whether a detached tensor is finite; it is read once."""
    tensor = TensorProto(data_type=data_type, dims=[place.length // 4])
    external.place(tensor, place)
    return bool(np.isfinite(external.values(tensor)).all())
