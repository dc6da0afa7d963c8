"""The part of F̃ that lies downstream of some Adds (supplement, Fig. 1): what a perturbation changes, and no more."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.protos import copy_fields, free_input, reads
from rdoq_onnx.passes.insert_adds import InsertAdds, parameter
from rdoq_onnx.probing.prefix import Prefix
from rdoq_onnx.system.runtime import Runtime, Session, Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Suffix:
    """Some Adds of F̃ and what follows them, loaded. It repeats the samples itself, once for each perturbation.

    edge: the tensors that it reads of F. parameters: the input for the perturbation of each tensor that has an Add.
    ranks: of the tensors that are repeated, along axis 0. row: bytes that one sample takes at both ends of the suffix.
    """

    session: Session
    edge: tuple[str, ...]
    parameters: Mapping[str, str]
    outputs: tuple[str, ...]
    ranks: frozenset[int]
    row: int

    @classmethod
    def of(cls, prefix: Prefix, kind: str, tensors: Sequence[str], runtime: Runtime) -> "Suffix":
        """kind: "a" for Adds behind activations, "z" behind the outputs of layers."""
        graph, outlines = prefix.graph, prefix.outlines
        edge, nodes = downstream(graph, tensors, prefix.ends, prefix.integers)
        repeated = [name for name in edge if name not in prefix.shared] if prefix.batching.rides else []
        ranks = frozenset(outlines[name].ndim for name in repeated)
        model = onnx.ModelProto()
        copy_fields(graph.model, model, skip={"graph"})
        model.graph.CopyFrom(helper.make_graph(
            [*_entrances(edge, repeated, outlines), *nodes],
            "suffix",
            [free_input(_fed(name), outlines[name]) for name in edge]
            + [helper.make_tensor_value_info(_counts(rank), TensorProto.INT64, [rank]) for rank in sorted(ranks)],
            [o for o in graph.model.graph.output if o.name in prefix.ends],
            value_info=[free_input(name, outlines[name]) for name in tensors],
        ))  # fmt: skip
        modified = (InsertAdds(tensors, ()) if kind == "a" else InsertAdds((), tensors))(model)
        del modified.graph.initializer[:]  # the zeros: what may be left out cannot be bound
        read = {*reads(nodes), *prefix.ends}
        modified.graph.initializer.extend(t for t in graph.model.graph.initializer if t.name in read)
        parameters = {t: parameter(kind, t) for t in tensors}
        ends = {*repeated, *tensors, *prefix.ends}
        return cls(
            runtime.session(modified, "all"), tuple(edge), parameters, prefix.ends, ranks,
            sum(outlines[name].nbytes for name in ends),
        )  # fmt: skip

    def run(self, tensors: Mapping[str, Tensor], perturbations: Mapping[str, Array], repeats: int) -> list[Array]:
        """The outputs of F̃ under so many perturbations of each tensor, which are stacked along axis 0 as they are."""
        feeds: dict[str, Array | Tensor] = {_fed(name): tensors[name] for name in self.edge}
        feeds |= {_counts(rank): np.array([repeats] + [1] * (rank - 1), np.int64) for rank in self.ranks}
        feeds |= {self.parameters[t]: value for t, value in perturbations.items()}
        return [value.numpy() for value in self.session.bound(feeds, self.outputs)]


def downstream(
    graph: Graph, starts: Sequence[str], ends: Sequence[str], integers: Collection[str]
) -> tuple[list[str], list[onnx.NodeProto]]:
    """(tensors read at the edge, nodes) of the part of `graph` that leads from the tensors `starts` to `ends`.

    Integers that the part reads are computed inside it: they are shapes more often than not, which must follow the
    batch that is really run.
    """
    reached, made = set(starts), set[str]()
    for node in graph.nodes:
        if not reached.isdisjoint(reads([node])):
            reached.update(node.output)
            made.update(node.output)
    pending = [*ends, *reads(n for n in graph.nodes if not made.isdisjoint(n.output))]
    edge: dict[str, None] = {}
    while pending:
        name = pending.pop()
        if name in made or name in graph.initializers:
            continue
        if name in integers and name in graph.producer:
            made.update(graph.producer[name].output)
            pending += reads([graph.producer[name]])
        else:
            edge[name] = None
    return list(edge), [n for n in graph.nodes if not made.isdisjoint(n.output)]


def _entrances(edge: Sequence[str], repeated: Sequence[str], outlines: Mapping[str, Array]) -> Iterator[onnx.NodeProto]:
    """Nodes that make the tensors of the edge from what is fed."""
    for name in edge:
        if name in repeated:
            yield helper.make_node("Tile", [_fed(name), _counts(outlines[name].ndim)], [name])
        else:
            yield helper.make_node("Identity", [_fed(name)], [name])


def _fed(tensor: str) -> str:
    """The input that a tensor of the edge is fed to."""
    return f"edge/{tensor}"


def _counts(rank: int) -> str:
    """The input that says how often a tensor of this rank is repeated along each axis."""
    return f"counts/{rank}"
