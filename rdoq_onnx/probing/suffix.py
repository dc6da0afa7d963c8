"""The part of F̃ downstream of some Adds (supplement, Fig. 1): exactly what a perturbation changes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.protos import copy_fields, declared, reads
from rdoq_onnx.passes.insert_adds import InsertAdds, parameter
from rdoq_onnx.probing.prefix import Prefix
from rdoq_onnx.system.runtime import Runtime, Session, Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Suffix:
    """A session of some Adds of F̃ and all that follows; the graph itself repeats the samples for each perturbation.

    edge: tensors of F that it consumes. parameters: the perturbation input of each tensor with an Add. ranks: those of
    the tensors repeated along axis 0. row: bytes of one sample at both ends of the suffix.
    """

    session: Session
    edge: tuple[str, ...]
    parameters: Mapping[str, str]
    outputs: tuple[str, ...]
    ranks: frozenset[int]
    row: int

    @classmethod
    def of(cls, prefix: Prefix, kind: str, tensors: Sequence[str], runtime: Runtime) -> "Suffix":
        """Build the suffix of `tensors`. kind: "a" for Adds behind activations, "z" for Adds behind layer outputs."""
        graph, outlines = prefix.graph, prefix.outlines
        edge, nodes = downstream(graph, tensors, prefix.ends, prefix.integers)
        repeated = [name for name in edge if name not in prefix.shared] if prefix.batching.stackable else []
        ranks = frozenset(outlines[name].ndim for name in repeated)
        inner = dict.fromkeys([*repeated, *tensors])
        model = onnx.ModelProto()
        copy_fields(graph.model, model, skip={"graph"})
        model.graph.CopyFrom(
            helper.make_graph(
                [*_entrances(edge, repeated, outlines), *nodes],
                "suffix",
                [declared(_fed(name), outlines[name], prefix.sizes[name]) for name in edge]
                + [helper.make_tensor_value_info(_counts(rank), TensorProto.INT64, [rank]) for rank in sorted(ranks)],
                [o for o in graph.model.graph.output if o.name in prefix.ends],
                value_info=[declared(name, outlines[name], prefix.sizes[name]) for name in inner],
            )
        )
        modified = (InsertAdds(tensors, ()) if kind == "a" else InsertAdds((), tensors))(model)
        del modified.graph.initializer[:]  # default zeros: an input with a default cannot be bound
        read = {*reads(nodes), *prefix.ends}
        modified.graph.initializer.extend(t for t in graph.model.graph.initializer if t.name in read)
        parameters = {t: parameter(kind, t) for t in tensors}
        ends = {*repeated, *tensors, *prefix.ends}
        return cls(
            runtime.session(modified, "all"),
            tuple(edge),
            parameters,
            prefix.ends,
            ranks,
            sum(outlines[name].nbytes for name in ends),
        )

    def run(self, tensors: Mapping[str, Tensor], perturbations: Mapping[str, Array], repeats: int) -> list[Array]:
        """Return the outputs of F̃ under `repeats` perturbations of each tensor; both are stacked along axis 0."""
        feeds: dict[str, Array | Tensor] = {_fed(name): tensors[name] for name in self.edge}
        feeds |= {_counts(rank): np.array([repeats] + [1] * (rank - 1), np.int64) for rank in self.ranks}
        feeds |= {self.parameters[t]: value for t, value in perturbations.items()}
        return [value.numpy() for value in self.session.bound(feeds, self.outputs)]


def downstream(
    graph: Graph, starts: Sequence[str], ends: Sequence[str], integers: Collection[str]
) -> tuple[list[str], list[onnx.NodeProto]]:
    """Return (consumed tensors, nodes) of the part of `graph` between the tensors `starts` and `ends`.

    The part itself computes the integers that it consumes: most are shapes, which must follow the actual batch.
    """
    reached, produced = set(starts), set[str]()
    for node in graph.nodes:
        if not reached.isdisjoint(reads([node])):
            reached.update(node.output)
            produced.update(node.output)
    pending = [*ends, *reads(n for n in graph.nodes if not produced.isdisjoint(n.output))]
    edge: dict[str, None] = {}
    while pending:
        name = pending.pop()
        if name in produced or name in graph.initializers:
            continue
        if name in integers and name in graph.producer:
            produced.update(graph.producer[name].output)
            pending += reads([graph.producer[name]])
        else:
            edge[name] = None
    return list(edge), [n for n in graph.nodes if not produced.isdisjoint(n.output)]


def _entrances(edge: Sequence[str], repeated: Sequence[str], outlines: Mapping[str, Array]) -> Iterator[onnx.NodeProto]:
    """Yield nodes that produce the edge tensors from the inputs."""
    for name in edge:
        if name in repeated:
            yield helper.make_node("Tile", [_fed(name), _counts(outlines[name].ndim)], [name])
        else:
            yield helper.make_node("Identity", [_fed(name)], [name])


def _fed(tensor: str) -> str:
    """Return the name of the input for an edge tensor."""
    return f"edge/{tensor}"


def _counts(rank: int) -> str:
    """Return the name of the input with the repeats along each axis of a tensor of this rank."""
    return f"counts/{rank}"
