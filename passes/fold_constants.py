"""Constant subgraphs that make a layer's weight, computed once.

Exporters leave Transpose, Reshape, Cast and the like between an initializer and the layer that it belongs to.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, helper
from onnx.reference import ReferenceEvaluator

from rdoq_onnx import surgeon
from rdoq_onnx.passes import Pass
from rdoq_onnx.surgeon import Constant, Graph, Node

_FOLDED = frozenset(["Cast", "Concat", "Flatten", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
_READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace the inputs of layers that are computed from initializers alone by initializers.

    Assumes that Constant nodes are initializers. Leaves other constant subgraphs, shape arithmetic above all, alone.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        return surgeon.edit(model, _fold)


def _fold(graph: Graph) -> None:
    opset = graph.opset
    for node in list(graph.nodes):
        if node.op in _READERS:
            for tensor in node.inputs:
                if not isinstance(tensor, Constant) and tensor.inputs:
                    _evaluate(graph, tensor.inputs[0], opset)


def _evaluate(graph: Graph, node: Node, opset: int) -> bool:
    """Make the output of `node` an initializer if all that it depends on are; whether it is one now."""
    if node.op not in _FOLDED or node.domain not in (None, "", "ai.onnx") or len(node.outputs) != 1:
        return False
    for tensor in node.inputs:
        if not isinstance(tensor, Constant) and not (tensor.inputs and _evaluate(graph, tensor.inputs[0], opset)):
            return False
    output = node.outputs[0]
    if any(output is t for t in graph.outputs):
        return False
    feeds = {f"i{k}": t.values for k, t in enumerate(node.inputs)}
    proto = helper.make_node(node.op, list(feeds), ["o"], **node.attrs)
    body = helper.make_graph(
        [proto],
        "constant",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name="o")],
    )
    single = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    (value,) = ReferenceEvaluator(single).run(None, feeds)
    surgeon.freeze(output, np.array(value))
    return True
