"""What is computed from constants alone, computed once.

Exporters leave Transpose, Reshape, Cast and the like between an initializer and the layer that it belongs to, and whole
subgraphs that end in the few integers of a Pad, Slice or Reshape.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rdoq_onnx import surgeon
from rdoq_onnx.passes import Pass
from rdoq_onnx.surgeon import Constant, Graph, Node

_READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
_FOLDED = frozenset(["Cast", "Concat", "Flatten", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
# Of results this small.
_ARITHMETIC = _FOLDED | {"Add", "ConstantOfShape", "Div", "Gather", "Shape", "Slice", "Sub"}
_SMALL = 64  # elements
_INPUT = 1024  # elements that they may be computed from; a Shape reads none


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace the inputs of layers, and small tensors, that are computed from initializers alone by initializers.

    Assumes that Constant nodes are initializers. Leaves larger tensors that feed no layer alone.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        return surgeon.edit(model, _fold)


def _fold(graph: Graph) -> None:
    opset, exposed = graph.opset, surgeon.exposed(graph)
    for node in list(graph.nodes):
        if node.op in _READERS:
            for tensor in node.inputs:
                if not isinstance(tensor, Constant) and tensor.inputs:
                    _freeze(graph, tensor.inputs[0], opset, exposed)
        elif node.op in _ARITHMETIC and _known(node):
            _evaluate(node, opset, exposed, _SMALL)


def _known(node: Node) -> bool:
    """Whether all inputs are constants, and so small that the result cannot be large."""
    given = [surgeon.values(t) for t in node.inputs if t.name]
    if any(v is None or (v.size > _INPUT and node.op != "Shape") for v in given):
        return False
    return node.op != "ConstantOfShape" or bool(0 <= math.prod(np.asarray(given[0]).tolist()) <= _SMALL)


def _freeze(graph: Graph, node: Node, opset: int, exposed: set[int]) -> bool:
    """Make the output of `node` an initializer if all that it depends on are; whether it is one now."""
    if node.op not in _FOLDED:
        return False
    for tensor in node.inputs:
        computed = not isinstance(tensor, Constant)
        if computed and not (tensor.inputs and _freeze(graph, tensor.inputs[0], opset, exposed)):
            return False
    return _evaluate(node, opset, exposed)


def _evaluate(node: Node, opset: int, exposed: set[int], most: int | None = None) -> bool:
    """Make the output of `node`, whose inputs are constants, an initializer unless it has over `most` elements."""
    output = node.outputs[0] if len(node.outputs) == 1 else None
    if output is None or node.domain not in (None, "", "ai.onnx") or id(output) in exposed:
        return False
    feeds = {f"i{k}": t.values for k, t in enumerate(node.inputs) if t.name}
    names = [f"i{k}" if t.name else "" for k, t in enumerate(node.inputs)]
    attrs = {k: numpy_helper.from_array(v.values) if isinstance(v, Constant) else v for k, v in node.attrs.items()}
    proto = helper.make_node(node.op, names, ["o"], **attrs)
    body = helper.make_graph(
        [proto],
        "constant",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name="o")],
    )
    single = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    value = np.asarray(next(iter(ReferenceEvaluator(single).run(None, feeds))))
    if most is not None and value.size > most:
        return False
    surgeon.freeze(output, value)
    return True
