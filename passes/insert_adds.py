"""The modified network F̃ of the supplement (Fig. 1, Eq. 2): F with an Add after every perturbed tensor.

F̃(x; s_1 ... s_l) reads a_i + s_i wherever F reads the activation a_i, and z_i + s_i wherever it reads the output z_i of
a weighted layer. At s = 0 it equals F. Every perturbation in the method, of a weight channel or an activation, is a
value of one s_i: ΔW_ij changes z_i by op(x_i, ΔW_ij) on channel j only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper
from onnx.shape_inference import infer_shapes

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Graph, Tensor
from rdoq_onnx.passes import Pass


@dataclass(frozen=True)
class InsertAdds(Pass):
    """Insert an Add with a parameter named by `parameter` after each listed tensor.

    The parameters are optional inputs of the model: zero initializers of shape [1, ..., 1] that a feed of any
    broadcastable shape overrides. An Add after an activation changes what its consumers read, but a graph output of
    that name keeps the value of F. An Add after a layer's output changes a graph output, too.

    activations, outputs: tensor names. A tensor may be in both.
    """

    activations: Sequence[str]
    outputs: Sequence[str]

    def __call__(self, model: ModelProto) -> ModelProto:
        ranks = _ranks(model)
        parameters: dict[str, int] = {}

        def insert(graph: Graph) -> None:
            tensors = graph.tensors()
            # For a tensor in both, the layer's Add must come first in the graph, so it is inserted last.
            for kind, names in (("a", self.activations), ("z", self.outputs)):
                for name in dict.fromkeys(names):
                    parameters[_add(graph, tensors[name], kind, ranks)] = ranks.get(name, 0)

        changed = surgeon.edit(model, insert)
        for name, rank in parameters.items():
            changed.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank))
        return changed


def parameter(kind: str, tensor: str) -> str:
    """The name of the parameter of `tensor`; kind is "a" for an activation, "z" for a layer's output."""
    return f"s_{kind}/{tensor}"


def _add(graph: Graph, tensor: Tensor, kind: str, ranks: dict[str, int]) -> str:
    name = surgeon.fresh(graph, parameter(kind, tensor.name))
    zero = surgeon.constant(name, np.zeros((1,) * ranks.get(tensor.name, 0), np.float32))
    surgeon.insert_after(
        graph,
        tensor,
        lambda t: surgeon.append(graph, "Add", [t, zero], f"add_{name}", like=tensor),
        outputs=kind == "z",
    )
    return name


def _ranks(model: ModelProto) -> dict[str, int]:
    graph = infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
