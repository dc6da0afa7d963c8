"""Scale channels of tensors by factors folded into constants, or by a Mul (see candidates/channel_scales.py)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import SCALING
from rdoq_onnx.model.surgeon import Constant, Graph, Node
from rdoq_onnx.passes import Pass

Float = NDArray[np.float64]


@dataclass(frozen=True)
class ScaleChannels(Pass):
    """Multiply constants and tensors by factors that cancel; the outputs of the network stay the same up to rounding.

    constants: factors of constant inputs, by node name and index of the input; they broadcast with the constant.
    tensors: factors of computed tensors. A Mul takes over the tensor's name and consumers; an Identity in front of
    quantized consumers becomes that Mul. operands: factors of computed inputs, by node name and index of the input,
    for that node alone.
    A constant with another consumer is copied.
    """

    constants: Mapping[tuple[str, int], Float]
    tensors: Mapping[str, Float]
    operands: Mapping[tuple[str, int], Float]

    def __call__(self, model: ModelProto) -> ModelProto:
        def scale(graph: Graph) -> None:
            nodes, tensors = {n.name: n for n in graph.nodes}, graph.tensors()
            for (name, index), factor in self.constants.items():
                _scale_constant(graph, nodes[name], index, factor)
            for name, factor in self.tensors.items():
                _multiply(graph, tensors[name], factor)
            for (name, index), factor in self.operands.items():
                _multiply_operand(graph, nodes[name], index, factor)

        return surgeon.edit(model, scale)


def _scale_constant(graph: Graph, node: Node, index: int, factor: Float) -> None:
    old: Constant = node.inputs[index]
    value = surgeon.values(old)
    scaled = np.ascontiguousarray(value.astype(np.float64) * factor, np.float32)
    # Patterns select layers by the name of the weight.
    name = old.name if len(old.outputs) == 1 else surgeon.fresh(graph, f"{old.name}/scaled")
    node.inputs[index] = surgeon.constant(name, scaled)


def _multiply(graph: Graph, tensor: surgeon.Tensor, factor: Float) -> None:
    constant = _factor(graph, tensor.name, factor)
    producer: Node = tensor.inputs[0]
    if producer.op == "Identity":
        producer.op, producer.inputs = "Mul", [producer.inputs[0], constant]
        producer.name = surgeon.fresh(graph, tensor.name + SCALING)
        return
    inner = surgeon.Variable(surgeon.fresh(graph, f"{tensor.name}/unscaled"), tensor.dtype, tensor.shape)
    producer.outputs[[t is tensor for t in producer.outputs].index(True)] = inner
    name = surgeon.fresh(graph, tensor.name + SCALING)
    graph.nodes.append(Node("Mul", name, None, [inner, constant], [tensor]))


def _multiply_operand(graph: Graph, node: Node, index: int, factor: Float) -> None:
    tensor = node.inputs[index]
    constant = _factor(graph, tensor.name, factor)
    node.inputs[index] = surgeon.append(graph, "Mul", [tensor, constant], tensor.name + SCALING, like=tensor)


def _factor(graph: Graph, stem: str, factor: Float) -> Constant:
    value = np.ascontiguousarray(factor, np.float32)
    return surgeon.constant(surgeon.fresh(graph, f"{stem}/factor"), value)
