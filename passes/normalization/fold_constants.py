"""What is computed from constants alone, computed once.

Exporters leave Transpose, Reshape, Cast and the like between an initializer and the layer that it belongs to, the
arithmetic of weights that are normalized or standardized as well, and whole subgraphs that end in the few integers of a
Pad, Slice or Reshape.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor
from rdoq_onnx.passes import Pass

_READERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
_ELEMENTWISE = frozenset({"Abs", "Add", "Div", "Max", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"})
_FOLDED = _ELEMENTWISE | {"Cast", "Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_FOLDED |= {"BatchNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
# Of results this small.
_ARITHMETIC = _FOLDED | {"ConstantOfShape", "Gather", "Shape", "Slice"}
_SMALL = 64  # elements
_INPUT = 1024  # elements that they may be computed from; a Shape reads none
_GROWTH = 16  # results together may hold so many times the elements of the model: a few doublings would fill all memory


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace the inputs of layers, and small tensors, that are computed from initializers alone by initializers.

    Assumes that Constant nodes are initializers. Leaves larger tensors that feed no layer alone.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        return surgeon.edit(model, _fold) if _starts(model) else model


def _starts(model: ModelProto) -> bool:
    """Whether any node that may be computed reads initializers alone, as the first of a chain does."""
    constants = {"", *(t.name for t in model.graph.initializer)}
    return any(n.op_type in _ARITHMETIC and constants.issuperset(n.input) for n in model.graph.node)


def _fold(graph: Graph) -> None:
    opset, exposed = graph.opset, surgeon.exposed(graph)
    room = _GROWTH * sum(math.prod(t.shape) for t in graph.tensors().values() if isinstance(t, Constant))
    computed: dict[int, tuple[int, Node]] = {}  # id of a tensor -> what makes it of constants alone, and its place
    for place, node in enumerate(graph.nodes):
        if node.op in _ARITHMETIC and _known(node) and _evaluate(node, opset, exposed, _SMALL):
            continue
        if node.op in _FOLDED and all(isinstance(t, Constant) or id(t) in computed for t in node.inputs):
            computed[id(node.outputs[0])] = place, node
        elif node.op in _READERS:
            for tensor in node.inputs:
                for maker in _makers(tensor, computed):
                    size = _most_elements(maker)
                    if size > room or not _evaluate(maker, opset, exposed):
                        break
                    room -= size


def _makers(tensor: Tensor, computed: Mapping[int, tuple[int, Node]]) -> list[Node]:
    """The nodes that make `tensor`, unless it is a constant by now, in their order."""
    found: dict[int, Node] = {}
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        if not isinstance(tensor, Constant) and id(tensor) in computed:
            place, node = computed[id(tensor)]
            if place not in found:
                found[place] = node
                pending.extend(node.inputs)
    return [node for _, node in sorted(found.items())]


def _known(node: Node) -> bool:
    """Whether all inputs are constants, and so small that the result cannot be large."""
    given = [surgeon.values(t) for t in node.inputs if t.name]
    if any(v is None or (v.size > _INPUT and node.op != "Shape") for v in given):
        return False
    return node.op != "ConstantOfShape" or bool(0 <= math.prod(np.asarray(given[0]).tolist()) <= _SMALL)


def _most_elements(node: Node) -> int:
    """Of the output of a node in _FOLDED, whose inputs are constants."""
    shapes = [t.shape for t in node.inputs]
    return math.prod(np.broadcast_shapes(*shapes)) if node.op in _ELEMENTWISE else sum(map(math.prod, shapes))


def _evaluate(node: Node, opset: int, exposed: set[int], most: int | None = None) -> bool:
    """Make the first output of `node`, whose inputs are constants, an initializer unless it has over `most` elements.

    False, and no change, where it has, and where somebody reads another output.
    """
    output, *others = node.outputs
    read = any(t.outputs or id(t) in exposed for t in others)
    if read or not surgeon.standard(node) or id(output) in exposed:
        return False
    feeds = {f"i{k}": t.values for k, t in enumerate(node.inputs) if t.name}
    names = [f"i{k}" if t.name else "" for k, t in enumerate(node.inputs)]
    attrs = {k: numpy_helper.from_array(v.values) if isinstance(v, Constant) else v for k, v in node.attrs.items()}
    proto = helper.make_node(node.op, names, [f"o{k}" for k in range(len(node.outputs))], **attrs)
    body = helper.make_graph(
        [proto],
        "constant",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name="o0")],
    )
    single = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    with np.errstate(all="ignore"):
        value = np.asarray(next(iter(ReferenceEvaluator(single).run(None, feeds))))
    if most is not None and value.size > most:
        return False
    surgeon.freeze(output, value)
    return True
