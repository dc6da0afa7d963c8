"""The stored tensors that a tensor's values come from, past operators that slice, join and turn constants.

Exporters keep the weights of a recurrent cell in another order than ONNX has them, and put them right at each run.
"""

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from rdoq_onnx.analysis.skips import QUANTIZED, Refusal
from rdoq_onnx.model.graph import attribute
from rdoq_onnx.model.protos import subgraphs_of

_MAX_VISITS = 256  # nodes and tensors visited per weight; exporters stay under 32
_KEEPS = frozenset({"Concat", "Identity", "Slice"})  # operators that leave the axes in their order
_TURNS = frozenset({"Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Scope:
    """What names mean inside a graph: the nodes that make them, the tensors stored under them; its own first.

    owners: the nodes whose bodies it is in, from the main graph on.
    """

    makers: ChainMap[str, NodeProto]
    stored: ChainMap[str, TensorProto]
    owners: tuple[NodeProto, ...] = ()

    def within(self, graph: GraphProto, *owner: NodeProto) -> "Scope":
        """The scope of `graph`, in this one, where it is the body of `owner`."""
        makers = {name: n for n in graph.node for name in n.output if name}
        stored = {t.name: t for t in graph.initializer}
        return Scope(self.makers.new_child(makers), self.stored.new_child(stored), self.owners + owner)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The values of a constant that is stored, or a Constant node's."""
        maker, tensor = self.makers.get(name), self.stored.get(name)
        if maker is not None and maker.op_type == "Constant":
            tensor, listed = attribute(maker, "value", None), attribute(maker, "value_ints", None)
            if listed is not None:
                return tuple(listed)
        return None if tensor is None else tuple(numpy_helper.to_array(tensor).reshape(-1).tolist())


def walk(graph: GraphProto, around: Scope | None = None, *owner: NodeProto) -> Iterator[tuple[NodeProto, Scope]]:
    """All nodes of `graph` and the graphs within it, each with its scope."""
    scope = (around or Scope(ChainMap(), ChainMap())).within(graph, *owner)
    for node in graph.node:
        yield node, scope
        for inner in subgraphs_of(node):
            yield from walk(inner, scope, node)


class Origin(NamedTuple):
    """A stored tensor; the node that reads it; for each axis of what is made of it the axis it was, None if new."""

    tensor: TensorProto
    reader: NodeProto
    axes: tuple[int | None, ...]


def origins(name: str, reader: NodeProto, scope: Scope) -> tuple[Origin, ...] | Refusal:
    """The stored tensors that hold the values of `name`, which `reader` reads; a Refusal if they cannot be found."""
    found: list[Origin] = []
    pending: list[tuple[str, NodeProto, tuple[NodeProto, ...]]] = [(name, reader, ())]
    for _ in range(_MAX_VISITS):
        if not pending:
            return tuple(found)
        wanted, by, path = pending.pop()
        maker = scope.makers.get(wanted)
        if maker is None:
            tensor = scope.stored.get(wanted)
            if tensor is None:
                return Refusal("it is computed, so there is no weight")
            axes = _axes(tuple(range(len(tensor.dims))), path, scope)
            if axes is None:
                reason = "is computed from constants with axes that are computed, too; fold it"
                return Refusal(f"its weight {name!r} {reason}")
            found.append(Origin(tensor, by, axes))
        elif maker.op_type == "DequantizeLinear":
            return Refusal(QUANTIZED)
        elif maker.op_type in _KEEPS | _TURNS and maker.domain in ("", "ai.onnx"):
            data = maker.input if maker.op_type == "Concat" else maker.input[:1]
            pending += [(i, maker, (*path, maker)) for i in data]
        else:
            reason = f"comes from a {maker.op_type}; if that is constant, fold it when exporting"
            return Refusal(f"its weight {name!r} {reason}")
    return Refusal(f"its weight {name!r} is made of too many constants; fold it when exporting")


def _axes(axes: tuple[int | None, ...], path: tuple[NodeProto, ...], scope: Scope) -> tuple[int | None, ...] | None:
    """`axes` of a stored tensor behind the nodes of `path`, the last of which reads it; None if that is unknown."""
    for node in reversed(path):
        rank = len(axes)
        if node.op_type == "Transpose":
            order = attribute(node, "perm", range(rank)[::-1])
            if sorted(order) != list(range(rank)):
                return None
            axes = tuple(axes[k] for k in order)
        elif node.op_type in _TURNS:
            given = scope.integers(node.input[1]) if len(node.input) > 1 else None
            if given is None:
                return None
            longer = rank + len(given)
            if node.op_type == "Squeeze":
                gone = {k % rank for k in given} if rank else set()
                axes = tuple(a for k, a in enumerate(axes) if k not in gone)
            else:
                rest, new = iter(axes), {k % longer for k in given}
                axes = tuple(None if k in new else next(rest, None) for k in range(longer))
    return axes
