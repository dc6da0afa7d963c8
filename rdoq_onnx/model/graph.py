"""Read-only look-ups into a graph: who makes a tensor, who reads it, what is constant, what only moves values."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from rdoq_onnx.model.protos import reads

# Operators whose output values are all input values (or the zero that every quantizer here represents).
MOVES = frozenset({"DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Slice"})
MOVES |= {"SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
# Operators that the quantizer's own saturation replaces, so that the integer convolution takes them in.
CLAMPS = frozenset({"Relu", "Clip", "Min"})
SIZES = frozenset({"Shape", "Size"})  # operators that read no values
_SMALL = 1024  # elements of a constant that is worth a look


class Graph:
    """Read-only look-ups into a model's top-level graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.opsets = list(model.opset_import)
        self.nodes = list(graph.node)
        self.producer = {o: n for n in graph.node for o in n.output if o}
        self.initializers = {t.name: t for t in graph.initializer}
        self.outputs = [o.name for o in graph.output]
        self.inputs = [i.name for i in graph.input if i.name not in self.initializers]
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(reads([node])):
                self.consumers.setdefault(name, []).append(node)
        self._ends = set(self.outputs)
        self._roots: dict[str, str] = {}  # known so far
        self.constants = set(self.initializers)
        for node in graph.node:
            if node.op_type == "Constant" or (node.input and all(i in self.constants for i in reads([node]))):
                self.constants.update(node.output)

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The value of a small initializer, which FoldConstants makes of what is computed; None for any other."""
        stored = self.initializers.get(tensor)
        return None if stored is None or math.prod(stored.dims) > _SMALL else numpy_helper.to_array(stored)

    def sole_consumer(self, tensor: str) -> onnx.NodeProto | None:
        """The one node that reads `tensor`, if there is just one and it is no graph output."""
        readers = self.consumers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self._ends else None

    def root(self, tensor: str) -> str:
        """Where the values of `tensor` are made: upstream past the operators that only move them."""
        passed = []
        while tensor not in self._roots and (node := self.producer.get(tensor)) is not None and moves(node, self):
            passed.append(tensor)
            tensor = node.input[0]
        root = self._roots.get(tensor, tensor)
        self._roots.update(dict.fromkeys(passed, root))
        return root


def moves(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether `node` only moves the values of its first input."""
    if node.domain not in ("", "ai.onnx") or (node.op_type == "MaxPool" and len(node.output) > 1):
        return False
    if node.op_type == "Pad":
        return _pads_with_zero(node, graph)
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", b"nearest") == b"nearest")
    return node.op_type in MOVES and node.input[0] not in graph.constants


def behind_clamp(tensor: str, graph: Graph) -> str:
    """The tensor behind the clamps by constants (Relu, Clip, Min) that alone read `tensor`, one after the other."""
    return behind(tensor, graph, lambda node: (
        node.op_type in CLAMPS and all(not i or i in graph.constants for i in node.input[1:])
    ))  # fmt: skip


def behind(tensor: str, graph: Graph, passed: Callable[[onnx.NodeProto], bool]) -> str:
    """The tensor behind the nodes that are `passed` and alone read `tensor`, one after the other."""
    while (reader := graph.sole_consumer(tensor)) is not None and passed(reader):
        tensor = reader.output[0]
    return tensor


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _pads_with_zero(node: onnx.NodeProto, graph: Graph) -> bool:
    if attribute(node, "mode", b"constant") != b"constant":
        return True
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.initializers.get(node.input[2])
    return value is not None and not onnx.numpy_helper.to_array(value).any()


def upstream(tensors: Sequence[str], producer: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that `tensors` are computed by, in the order of `producer`, which is one of execution."""
    found: set[int] = set()
    pending = list(tensors)
    while pending:
        node = producer.get(pending.pop())
        if node is not None and id(node) not in found:
            found.add(id(node))
            pending += reads([node])
    return list({id(n): n for n in producer.values() if id(n) in found}.values())
