"""What a rule sees of a fused node, and the nodes that it puts in its place.

A rule returns a tensor for each output of the node, None for one that nobody may read. It returns None for a form of
the operator that it does not cover, or whose ranks are not known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, TypeProto, shape_inference

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.model.surgeon import Graph, Node, Tensor

LOWEST = np.finfo(np.float32).min

Size = int | str | None  # a dimension: fixed, free with a name, or free
Results = Sequence[Tensor | None] | None
Rule = Callable[["Block"], Results]

_SMALL = 1024  # elements: shape inference may need the values of smaller constants


@dataclass(frozen=True)
class Block:
    """A fused node and what is known of the types of tensors. first: the number of nodes before any was added."""

    graph: Graph
    node: Node
    types: Mapping[str, TypeProto.Tensor]
    first: int

    def input(self, index: int) -> Tensor | None:
        """The input at `index`; None if it is left out."""
        tensor = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if tensor is None or not tensor.name else tensor

    def required(self, count: int) -> list[Tensor]:
        """The first `count` inputs, which the operator requires."""
        return list(self.node.inputs[:count])

    def attribute(self, name: str, default: Any) -> Any:
        return self.node.attrs.get(name, default)

    def knows(self, *names: str) -> bool:
        """Whether the node has no other attributes than `names`, but for ones that are 0 or empty."""
        return not any(value for name, value in self.node.attrs.items() if name not in names)

    @property
    def is_float32(self) -> bool:
        """Whether the node computes in float32, as far as is known."""
        kinds = [t.elem_type for tensor in self.node.inputs if (t := self.types.get(tensor.name)) is not None]
        return not {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE} & set(kinds)

    def read(self, index: int) -> bool:
        """Whether anything reads the output at `index`."""
        if index >= len(self.node.outputs) or not self.node.outputs[index].name:
            return False
        output = self.node.outputs[index]
        return bool(output.outputs) or id(output) in surgeon.exposed(self.graph)

    def sizes(self, tensor: Tensor) -> tuple[Size, ...] | None:
        """The shape of `tensor`, as far as it is known; None if not even its rank is."""
        if isinstance(tensor, surgeon.Constant):
            return tuple(tensor.shape)
        kind = self.types.get(tensor.name)
        if kind is None or not kind.HasField("shape"):
            return None
        return tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param if d.dim_param else None for d in kind.shape.dim
        )

    def rank(self, tensor: Tensor | None) -> int | None:
        sizes = None if tensor is None else self.sizes(tensor)
        return None if sizes is None else len(sizes)

    def width(self, tensor: Tensor) -> int | None:
        """The size of the last axis; None if not known."""
        sizes = self.sizes(tensor)
        return sizes[-1] if sizes and isinstance(sizes[-1], int) else None

    def is_boolean(self, tensor: Tensor) -> bool | None:
        kind = self.types.get(tensor.name)
        return None if kind is None else kind.elem_type == TensorProto.BOOL

    def op(self, op: str, *inputs: Tensor, **attrs: Any) -> Tensor:
        """Add a node and return its output."""
        return surgeon.append(self.graph, op, inputs, f"{self.node.name or self.node.op}/{op}", attrs=attrs)

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Split `tensor` along its last axis."""
        stem = f"{self.node.name or self.node.op}/Split"
        parts = [surgeon.Variable(surgeon.fresh(self.graph, f"{stem}_out")) for _ in sizes]
        node = Node("Split", surgeon.fresh(self.graph, stem), {"axis": -1}, [tensor, self.integers(*sizes)], parts)
        self.graph.nodes.append(node)
        return parts

    def integers(self, *values: int) -> Tensor:
        return self._constant(np.array(values, np.int64))

    def integer(self, value: int) -> Tensor:
        return self._constant(np.array(value, np.int64))

    def number(self, value: float) -> Tensor:
        return self._constant(np.array(value, np.float32))

    def vector(self, values: Any) -> Tensor:
        return self._constant(np.asarray(values, np.float32))

    def scaled(self, tensor: Tensor, factor: float) -> Tensor:
        return tensor if factor == 1 else self.op("Mul", tensor, self.number(factor))

    def dimension(self, tensor: Tensor, axis: int) -> Tensor:
        """A scalar: the size of `tensor` along `axis`."""
        return self.op("Gather", self.op("Shape", tensor), self.integer(axis), axis=0)

    def span(self, start: Tensor, stop: Tensor) -> Tensor:
        """start, start + 1, ..., stop - 1."""
        return self.op("Range", start, stop, self.integer(1))

    def mean(self, tensor: Tensor, axes: Sequence[int] = (-1,)) -> Tensor:
        """The mean over `axes`, which stay."""
        return self._reduced("ReduceMean", tensor, axes)

    def greatest(self, tensor: Tensor) -> Tensor:
        """The greatest value along the last axis, which stays."""
        return self._reduced("ReduceMax", tensor, (-1,))

    def _reduced(self, op: str, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        if self.graph.opset >= 18:
            return self.op(op, tensor, self.integers(*axes), keepdims=1)
        return self.op(op, tensor, axes=[*axes], keepdims=1)

    def replace(self, results: Sequence[Tensor | None]) -> None:
        """Take the node out and give its outputs the values of `results`."""
        outputs = list(self.node.outputs)
        added = {id(node) for node in self.graph.nodes[self.first :]}
        self.node.inputs.clear()
        self.node.outputs.clear()
        for output, result in zip(outputs, results, strict=False):
            if result is None or not output.name:
                continue
            if result.inputs and id(result.inputs[0]) in added:
                self._rename(result, output)
            else:  # a tensor of the model itself, as caches that are passed on
                name = surgeon.fresh(self.graph, f"{output.name}/Identity")
                self.graph.nodes.append(Node("Identity", name, {}, [result], [output]))

    def withdraw(self) -> None:
        """Take the added nodes out again."""
        for node in self.graph.nodes[self.first :]:
            node.inputs.clear()
            node.outputs.clear()
        del self.graph.nodes[self.first :]

    def _rename(self, result: Tensor, output: Tensor) -> None:
        """Let the producer of `result` make `output` instead."""
        readers, producer = list(result.outputs), result.inputs[0]
        producer.outputs[next(k for k, t in enumerate(producer.outputs) if t is result)] = output
        for node in readers:
            for index in (k for k, t in enumerate(node.inputs) if t is result):
                node.inputs[index] = output

    def _constant(self, value: Any) -> Tensor:
        return surgeon.constant(surgeon.fresh(self.graph, f"{self.node.name or self.node.op}/constant"), value)


def tensor_types(model: ModelProto) -> dict[str, TypeProto.Tensor]:
    """The types of tensors by name, as far as onnx infers them."""
    try:
        graph = shape_inference.infer_shapes(weights_as_inputs(model, larger_than=_SMALL), data_prop=True).graph
    except Exception:  # it rejects many models that run
        graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.name: v.type.tensor_type for v in values if v.type.HasField("tensor_type")}
