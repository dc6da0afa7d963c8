"""A branch for those readers of a tensor that want it quantized, where others read it in float.

    a ─┬─ Identity ─ a/quantized ─ layers
       └─ nodes that compute in float

Quantizers, Adds and curves are then those of the branch. InsertQDQ joins the two again, with a quantizer between.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import BRANCH
from rdoq_onnx.model.surgeon import Graph
from rdoq_onnx.passes import Pass


@dataclass(frozen=True)
class BranchReaders(Pass):
    """Put an Identity in front of the nodes given for each tensor; bodies of subgraphs read on from the tensor itself.

    Assumes unique node names.
    """

    readers: Mapping[str, Collection[str]]

    def __call__(self, model: ModelProto) -> ModelProto:
        def insert(graph: Graph) -> None:
            nodes, tensors = {n.name: n for n in graph.nodes}, graph.tensors()
            for name, readers in self.readers.items():
                tensor = tensors[name]
                branch = surgeon.append(graph, "Identity", [tensor], "branch", like=tensor)
                branch.name = surgeon.fresh(graph, name + BRANCH)
                for inputs in (nodes[reader].inputs for reader in readers):
                    for index in (k for k, t in enumerate(inputs) if t is tensor):
                        inputs[index] = branch

        return surgeon.edit(model, insert)


def join_readers(graph: Graph) -> None:
    """Take the Identity of each branch out. Normalize has left no other but where it cannot go."""
    for node in graph.nodes:
        if node.op == "Identity" and surgeon.standard(node):
            surgeon.bypass(graph, node)
