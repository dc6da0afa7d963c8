"""Trace a tensor's values to the initializers they come from, through operators that slice, join and transpose.

Exporters store the weights of a recurrent cell in another order than ONNX's, and reorder them at each run.
"""

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from onnx import GraphProto, NodeProto, TensorProto

from rdoq_onnx.analysis.skips import QUANTIZED, Refusal
from rdoq_onnx.model import external
from rdoq_onnx.model.graph import attribute
from rdoq_onnx.model.protos import subgraphs_of

_MAX_VISITS = 256  # nodes and tensors visited per weight; exporters stay under 32
_SAME_AXES = frozenset({"Concat", "Identity", "Slice"})  # operators that keep the order of axes
_NEW_AXES = frozenset({"Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Scope:
    """The producer or initializer of each name visible in a graph; inner definitions shadow outer ones.

    owners: the nodes whose bodies contain the graph, outermost first.
    """

    producers: ChainMap[str, NodeProto]
    stored: ChainMap[str, TensorProto]
    owners: tuple[NodeProto, ...] = ()

    def within(self, graph: GraphProto, *owner: NodeProto) -> "Scope":
        """The scope of `graph` as a body of `owner` within this scope."""
        producers = {name: n for n in graph.node for name in n.output if name}
        stored = {t.name: t for t in graph.initializer}
        return Scope(self.producers.new_child(producers), self.stored.new_child(stored), self.owners + owner)

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The values of an initializer or a Constant node; None for any other tensor."""
        producer, tensor = self.producers.get(name), self.stored.get(name)
        if producer is not None and producer.op_type == "Constant":
            tensor, integers = attribute(producer, "value", None), attribute(producer, "value_ints", None)
            if integers is not None:
                return tuple(integers)
        return None if tensor is None else tuple(external.values(tensor).reshape(-1).tolist())


def walk(graph: GraphProto, around: Scope | None = None, *owner: NodeProto) -> Iterator[tuple[NodeProto, Scope]]:
    """Yield all nodes of `graph` and its nested graphs, each with its scope."""
    scope = (around or Scope(ChainMap(), ChainMap())).within(graph, *owner)
    for node in graph.node:
        yield node, scope
        for inner in subgraphs_of(node):
            yield from walk(inner, scope, node)


class Origin(NamedTuple):
    """An initializer, the node that reads it, and for each axis of the traced tensor its axis here, None if new."""

    tensor: TensorProto
    consumer: NodeProto
    axes: tuple[int | None, ...]


def origins(name: str, consumer: NodeProto, scope: Scope) -> tuple[Origin, ...] | Refusal:
    """The initializers that hold the values of `name`, an input of `consumer`; a Refusal if they cannot be traced."""
    result: list[Origin] = []
    pending: list[tuple[str, NodeProto, tuple[NodeProto, ...]]] = [(name, consumer, ())]
    for _ in range(_MAX_VISITS):
        if not pending:
            return tuple(result)
        source, reader, path = pending.pop()
        producer = scope.producers.get(source)
        if producer is None:
            tensor = scope.stored.get(source)
            if tensor is None:
                return Refusal("it is computed, so there is no weight")
            axes = _axes(tuple(range(len(tensor.dims))), path, scope)
            if axes is None:
                reason = "is computed from constants along computed axes; fold constants when exporting"
                return Refusal(f"its weight {name!r} {reason}")
            result.append(Origin(tensor, reader, axes))
        elif producer.op_type == "DequantizeLinear":
            return Refusal(QUANTIZED)
        elif producer.op_type in _SAME_AXES | _NEW_AXES and producer.domain in ("", "ai.onnx"):
            data = producer.input if producer.op_type == "Concat" else producer.input[:1]
            pending += [(i, producer, (*path, producer)) for i in data]
        else:
            reason = f"comes from a {producer.op_type}; if that is constant, fold constants when exporting"
            return Refusal(f"its weight {name!r} {reason}")
    return Refusal(f"its weight {name!r} is assembled from too many constants; fold constants when exporting")


def _axes(axes: tuple[int | None, ...], path: tuple[NodeProto, ...], scope: Scope) -> tuple[int | None, ...] | None:
    """The `axes` of an initializer after the nodes of `path`, the last of which reads it; None if unknown."""
    for node in reversed(path):
        rank = len(axes)
        if node.op_type == "Transpose":
            order = attribute(node, "perm", range(rank)[::-1])
            if sorted(order) != list(range(rank)):
                return None
            axes = tuple(axes[k] for k in order)
        elif node.op_type in _NEW_AXES:
            changed = scope.integers(node.input[1]) if len(node.input) > 1 else None
            if changed is None:
                return None
            longer = rank + len(changed)
            if node.op_type == "Squeeze":
                removed = {k % rank for k in changed} if rank else set()
                axes = tuple(a for k, a in enumerate(axes) if k not in removed)
            else:
                rest, new = iter(axes), {k % longer for k in changed}
                axes = tuple(None if k in new else next(rest, None) for k in range(longer))
    return axes
