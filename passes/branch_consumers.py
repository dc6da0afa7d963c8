"""Branch a tensor for the consumers that read it quantized, where others read it in float.

    a ─┬─ Identity ─ a/quantized ─ layers
       └─ nodes that compute in float

Quantizers, Adds and curves then belong to the branch. InsertQDQ replaces the Identity by a quantizer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import BRANCH
from rdoq_onnx.model.surgeon import Graph
from rdoq_onnx.passes import Pass


@dataclass(frozen=True)
class BranchConsumers(Pass):
    """Insert an Identity between each tensor and the nodes listed for it; subgraph bodies still read the tensor itself.

    Assumes unique node names.
    """

    consumers: Mapping[str, Collection[str]]

    def __call__(self, model: ModelProto) -> ModelProto:
        def insert(graph: Graph) -> None:
            nodes, tensors = {n.name: n for n in graph.nodes}, graph.tensors()
            for name, consumers in self.consumers.items():
                tensor = tensors[name]
                branch = surgeon.append(graph, "Identity", [tensor], "branch", like=tensor)
                branch.name = surgeon.fresh(graph, name + BRANCH)
                for inputs in (nodes[consumer].inputs for consumer in consumers):
                    for index in (k for k, t in enumerate(inputs) if t is tensor):
                        inputs[index] = branch

        return surgeon.edit(model, insert)


def join_branches(graph: Graph) -> None:
    """Remove the Identity of each branch. Normalize has removed all others that can be."""
    for node in graph.nodes:
        if node.op == "Identity" and surgeon.standard(node):
            surgeon.bypass(graph, node)
