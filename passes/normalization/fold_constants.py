"""Constant folding: compute once what depends on constants only.

Exporters leave Transpose, Reshape, Cast and the like between an initializer and its layer, the arithmetic of normalized
or standardized weights, and whole subgraphs that compute the few integers of a Pad, Slice or Reshape.
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

_CONSUMERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
_ELEMENTWISE = frozenset({"Abs", "Add", "Div", "Max", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"})
_FOLDED = _ELEMENTWISE | {"Cast", "Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_FOLDED |= {"BatchNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"}
# Folded anywhere if the result has at most _SMALL elements.
_ARITHMETIC = _FOLDED | {"ConstantOfShape", "Gather", "Shape", "Slice"}
_SMALL = 64  # elements
_MAX_INPUT = 1024  # elements of their inputs; a Shape reads none
_GROWTH = 16  # limit of all results together, as a multiple of the model's elements: a few doublings would fill memory


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace inputs of layers, and small tensors, by initializers if they are computed from initializers only.

    Assumes that Constant nodes have become initializers. Leaves larger tensors that do not feed a layer.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        return surgeon.edit(model, _fold) if _any_foldable(model) else model


def _any_foldable(model: ModelProto) -> bool:
    """Whether any foldable node reads only initializers, as the first of a chain does."""
    constants = {"", *(t.name for t in model.graph.initializer)}
    return any(n.op_type in _ARITHMETIC and constants.issuperset(n.input) for n in model.graph.node)


def _fold(graph: Graph) -> None:
    opset, exposed = graph.opset, surgeon.exposed(graph)
    room = _GROWTH * sum(math.prod(t.shape) for t in graph.tensors().values() if isinstance(t, Constant))
    computed: dict[int, tuple[int, Node]] = {}  # id of a tensor with constant ancestors -> its producer and its place
    for place, node in enumerate(graph.nodes):
        if node.op in _ARITHMETIC and _has_small_constants(node) and _evaluate(node, opset, exposed, _SMALL):
            continue
        if node.op in _FOLDED and all(isinstance(t, Constant) or id(t) in computed for t in node.inputs):
            computed[id(node.outputs[0])] = place, node
        elif node.op in _CONSUMERS:
            for tensor in node.inputs:
                for producer in _producers(tensor, computed):
                    size = _max_elements(producer)
                    if size > room or not _evaluate(producer, opset, exposed):
                        break
                    room -= size


def _producers(tensor: Tensor, computed: Mapping[int, tuple[int, Node]]) -> list[Node]:
    """The nodes that compute `tensor`, in graph order; none if it has become a constant."""
    producers: dict[int, Node] = {}
    pending = [tensor]
    while pending:
        tensor = pending.pop()
        if not isinstance(tensor, Constant) and id(tensor) in computed:
            place, node = computed[id(tensor)]
            if place not in producers:
                producers[place] = node
                pending.extend(node.inputs)
    return [node for _, node in sorted(producers.items())]


def _has_small_constants(node: Node) -> bool:
    """Whether all inputs are constants, and so small that the result cannot be large."""
    read = [t for t in node.inputs if t.name]
    # Sizes first: the values of a large one are read from the disk.
    if any(not isinstance(t, Constant) or (math.prod(t.shape) > _MAX_INPUT and node.op != "Shape") for t in read):
        return False
    values = [surgeon.values(t) for t in read]
    if any(v is None for v in values):
        return False
    return node.op != "ConstantOfShape" or bool(0 <= math.prod(np.asarray(values[0]).tolist()) <= _SMALL)


def _max_elements(node: Node) -> int:
    """An upper bound of the output's elements for a node in _FOLDED with constant inputs."""
    shapes = [t.shape for t in node.inputs]
    return math.prod(np.broadcast_shapes(*shapes)) if node.op in _ELEMENTWISE else sum(map(math.prod, shapes))


def _evaluate(node: Node, opset: int, exposed: set[int], limit: int | None = None) -> bool:
    """Turn the first output of `node`, whose inputs are constants, into an initializer of at most `limit` elements.

    Returns False and changes nothing if it has more, is a graph output, or another output is read.
    """
    output, *others = node.outputs
    read = any(t.outputs or id(t) in exposed for t in others)
    if read or not surgeon.standard(node) or id(output) in exposed:
        return False
    feeds = {f"i{k}": np.asarray(surgeon.values(t)) for k, t in enumerate(node.inputs) if t.name}
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
    if limit is not None and value.size > limit:
        return False
    surgeon.freeze(output, value)
    return True
