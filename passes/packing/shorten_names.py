"""Short names for what a quantizer added: a name may be longer than the tensor or node that it stands for."""

import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, product

from onnx import GraphProto, ModelProto

from rdoq_onnx.model.protos import all_names, subgraphs_of
from rdoq_onnx.passes import Pass

_LETTERS = string.ascii_lowercase + string.ascii_uppercase
_REST = _LETTERS + string.digits


@dataclass(frozen=True)
class ShortenNames(Pass):
    """Rename every tensor and node, in subgraphs too, whose name is not in `keep`, and drop what is told of its type.

    The more often a name stands in the file, the shorter it gets. Inputs and outputs of the graph keep their names, and
    nodes without a name stay without one. Assumes that the bodies of functions are scopes of their own, as ONNX has it.
    """

    keep: Collection[str]

    def __call__(self, model: ModelProto) -> ModelProto:
        result = ModelProto()
        result.CopyFrom(model)
        graph = result.graph
        kept = {*self.keep, *(t.name for t in (*graph.input, *graph.output))}
        uses = Counter(name for name in all_names(graph) if name and name not in kept)
        # Names that are about to go are not in the way.
        free = (name for name in _names() if name not in kept)
        short = {name: next(free) for name, _ in uses.most_common()}
        _rename(graph, lambda name: short.get(name, name))
        return result


def _names() -> Iterator[str]:
    """Identifiers, the shortest first."""
    for length in count():
        for first, *rest in product(_LETTERS, *[_REST] * length):
            yield first + "".join(rest)


def _rename(graph: GraphProto, new: Callable[[str], str]) -> None:
    for index in reversed(range(len(graph.value_info))):
        if new(graph.value_info[index].name) != graph.value_info[index].name:
            del graph.value_info[index]
    for named in (*graph.input, *graph.output, *graph.initializer, *(t.values for t in graph.sparse_initializer)):
        named.name = new(named.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = new(annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = new(entry.value)
    for node in graph.node:
        node.name = new(node.name)
        node.input[:] = _all(node.input, new)
        node.output[:] = _all(node.output, new)
        for inner in subgraphs_of(node):
            _rename(inner, new)


def _all(names: Iterable[str], new: Callable[[str], str]) -> list[str]:
    return [new(name) for name in names]
