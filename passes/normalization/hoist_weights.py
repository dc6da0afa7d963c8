"""Move weights in the bodies of If, Loop and Scan to initializers of the main graph, which the bodies capture.

Weights that share a name are renamed: two branches may use the same name for different weights.
"""

from collections import Counter
from collections.abc import Iterator, KeysView
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from rdoq_onnx.model.graph import attribute
from rdoq_onnx.model.protos import all_names, rename, subgraphs_of
from rdoq_onnx.passes import Pass


@dataclass(frozen=True)
class HoistWeights(Pass):
    """Move float32 initializers and Constant nodes of rank 2 or more out of subgraphs.

    Leaves those that are inputs or outputs of their graph, and models without any, unchanged.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        if not any(_weights(inner) for inner in _bodies(model.graph)):
            return model
        result = ModelProto()
        result.CopyFrom(model)
        defined = Counter(_definitions(result.graph))
        taken = set(all_names(result.graph))
        for body in _bodies(result.graph):
            weights = _weights(body)
            names = {name: _unique(name, taken) if defined[name] > 1 else name for name in weights}
            for name, tensor in weights.items():
                result.graph.initializer.add().CopyFrom(tensor)
                result.graph.initializer[-1].name = names[name]
            _remove(body, weights.keys())
            rename(body.node, names)
        return result

    def ensures(self, model: ModelProto) -> None:
        """Nothing beyond what `check` verifies."""


def _bodies(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for inner in subgraphs_of(node):
            yield inner
            yield from _bodies(inner)


def _weights(body: GraphProto) -> dict[str, TensorProto]:
    ends = {v.name for v in (*body.input, *body.output)}
    stored = {t.name: t for t in body.initializer}
    stored.update({n.output[0]: t for n in body.node if (t := _constant(n)) is not None})
    return {
        name: t
        for name, t in stored.items()
        if t.data_type == TensorProto.FLOAT and len(t.dims) > 1 and name not in ends
    }


def _constant(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node, if it has one."""
    return attribute(node, "value", None) if node.op_type == "Constant" else None


def _remove(body: GraphProto, names: KeysView[str]) -> None:
    for index in reversed(range(len(body.initializer))):
        if body.initializer[index].name in names:
            del body.initializer[index]
    for index in reversed(range(len(body.node))):
        if body.node[index].op_type == "Constant" and body.node[index].output[0] in names:
            del body.node[index]


def _definitions(graph: GraphProto) -> Iterator[str]:
    """Yield the name of each graph input, initializer and node output, once per definition."""
    yield from {*(v.name for v in graph.input), *(t.name for t in graph.initializer)}
    for node in graph.node:
        yield from node.output
        for inner in subgraphs_of(node):
            yield from _definitions(inner)


def _unique(name: str, taken: set[str]) -> str:
    fresh, count = name, 0
    while fresh in taken:
        count += 1
        fresh = f"{name}_{count}"
    taken.add(fresh)
    return fresh
