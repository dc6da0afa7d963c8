"""Read-only look-ups into a graph: producers, consumers, constants, movement operators."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.model import external
from rdoq_onnx.model.protos import reads

# Movement operators: every output value is an input value, or the zero that every quantizer here represents.
MOVEMENT = frozenset({"DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape", "Slice"})
MOVEMENT |= {"SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
# Those whose output holds all values of the input.
REARRANGING = frozenset({"Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
# Operators that the quantizer's saturation can replace, so that they fuse into the integer convolution.
CLAMPS = frozenset({"Relu", "Clip", "Min"})
SHAPE_OPS = frozenset({"Shape", "Size"})  # read the shape of a tensor, not its values
_SMALL = 1024  # elements: larger initializers are not decoded


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
        self._roots: dict[str, str] = {}  # cache of `root`
        self.constants = set(self.initializers)
        for node in graph.node:
            if node.op_type == "Constant" or (node.input and all(i in self.constants for i in reads([node]))):
                self.constants.update(node.output)

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The value of a small initializer (FoldConstants has folded computed ones); None for any other tensor."""
        stored = self.initializers.get(tensor)
        return None if stored is None or math.prod(stored.dims) > _SMALL else external.values(stored)

    def sole_consumer(self, tensor: str) -> onnx.NodeProto | None:
        """The only consumer of `tensor`; None if there are several or `tensor` is a graph output."""
        consumers = self.consumers.get(tensor, [])
        return consumers[0] if len(consumers) == 1 and tensor not in self._ends else None

    def root(self, tensor: str) -> str:
        """The tensor whose values `tensor` holds: upstream past all movement operators."""
        path = []
        while tensor not in self._roots and (node := self.producer.get(tensor)) is not None and is_movement(node, self):
            path.append(tensor)
            tensor = node.input[0]
        root = self._roots.get(tensor, tensor)
        self._roots.update(dict.fromkeys(path, root))
        return root


def operand_root(tensor: str, graph: Graph) -> str:
    """The tensor whose values `tensor` holds, all of them: a part of a Split has a range of its own.

    In front of such a part, what is squeezed or reshaped may stack q, k and v, without samples along its first axis.
    """
    root = _above(tensor, graph, REARRANGING)
    producer = graph.producer.get(root)
    in_part = producer is not None and is_movement(producer, graph)
    return _above(tensor, graph, frozenset({"Transpose"})) if in_part else root


def _above(tensor: str, graph: Graph, through: frozenset[str]) -> str:
    """The first tensor upstream that no movement operator of the types `through` produces."""
    while (node := graph.producer.get(tensor)) is not None and node.op_type in through and is_movement(node, graph):
        tensor = node.input[0]
    return tensor


def is_movement(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether `node` only moves the values of its first input."""
    if node.domain not in ("", "ai.onnx") or (node.op_type == "MaxPool" and len(node.output) > 1):
        return False
    if node.op_type == "Pad":
        return _pads_with_zero(node, graph)
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", b"nearest") == b"nearest")
    return node.op_type in MOVEMENT and node.input[0] not in graph.constants


def after_clamps(tensor: str, graph: Graph) -> str:
    """The tensor after the chain of clamps by constants (Relu, Clip, Min) that starts at `tensor`.

    Each clamp in the chain is the only consumer of its input.
    """
    return downstream(
        tensor,
        graph,
        lambda node: node.op_type in CLAMPS and all(not i or i in graph.constants for i in node.input[1:]),
    )


def downstream(tensor: str, graph: Graph, passes: Callable[[onnx.NodeProto], bool]) -> str:
    """Follow `tensor` downstream while its only consumer satisfies `passes`; return where that ends."""
    while (consumer := graph.sole_consumer(tensor)) is not None and passes(consumer):
        tensor = consumer.output[0]
    return tensor


def behind(tensor: str, passed: frozenset[str], producer: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The producer of `tensor`, in front of nodes of the types `passed`."""
    maker = producer.get(tensor)
    while maker is not None and maker.op_type in passed:
        maker = producer.get(maker.input[0])
    return maker


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _pads_with_zero(node: onnx.NodeProto, graph: Graph) -> bool:
    if attribute(node, "mode", b"constant") != b"constant":
        return True
    if len(node.input) < 3 or not node.input[2]:
        return True
    value = graph.initializers.get(node.input[2])
    return value is not None and not external.values(value).any()


def upstream(tensors: Sequence[str], producer: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that compute `tensors`, in the order of `producer`, which must be an execution order."""
    needed: set[int] = set()
    pending = list(tensors)
    while pending:
        node = producer.get(pending.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            pending += reads([node])
    return list({id(n): n for n in producer.values() if id(n) in needed}.values())
