"""Move channel scales from a tensor's producers to its consumers (see rdoq_onnx/observation/equalization.py)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Node
from rdoq_onnx.passes import Pass

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale channels; the outputs of the network stay the same up to rounding.

    outputs: factors of a Conv's or Gemm's output channels, by node name. inputs: factors by which its input channels
    have been scaled, by node name; its weights are divided by them. capped: factors of the channels of a Clip to 0..c,
    which becomes Relu and Min; [C, 1, ...] as it broadcasts to the output.
    Assumes that no weight or bias has other consumers.
    """

    outputs: Mapping[str, Float]
    inputs: Mapping[str, Float]
    capped: Mapping[str, Float]

    def __call__(self, model: ModelProto) -> ModelProto:
        def scale(graph: Graph) -> None:
            for node in list(graph.nodes):
                if node.name in self.outputs or node.name in self.inputs:
                    _scale_layer(node, self.outputs.get(node.name), self.inputs.get(node.name))
                elif node.name in self.capped:
                    _cap(graph, node, self.capped[node.name])

        return surgeon.edit(model, scale)


def _scale_layer(node: Node, outputs: Float | None, inputs: Float | None) -> None:
    weight = node.inputs[1].values.astype(np.float64)
    by_output = weight if node.op == "Conv" or node.attrs.get("transB", 0) else weight.T
    flat = by_output.reshape(*by_output.shape[:2], -1)
    if outputs is not None:
        flat = flat * outputs[:, None, None]
        if len(node.inputs) > 2 and node.inputs[2].name:
            bias: Constant = node.inputs[2]
            node.inputs[2] = _scaled(bias, bias.values * outputs)
    if inputs is not None:
        groups = node.attrs.get("group", 1)
        split = flat.reshape(groups, -1, *flat.shape[1:])
        flat = (split / inputs.reshape(groups, 1, -1, 1)).reshape(flat.shape)
    scaled = flat.reshape(by_output.shape)
    node.inputs[1] = _scaled(node.inputs[1], scaled if by_output is weight else scaled.T)


def _cap(graph: Graph, node: Node, factor: Float) -> None:
    """Clip(x, 0, c) of unscaled channels -> Min(Relu(x), c·r) of channels scaled by r."""
    ceiling = float(node.inputs[2].values) * factor[None]
    output = node.outputs[0]
    floor = surgeon.append(graph, "Relu", [node.inputs[0]], f"{node.name}_Relu", like=output)
    node.op, node.attrs = "Min", {}
    node.inputs = [floor, _constant(graph, f"{node.name}_ceiling", ceiling)]


def _scaled(old: Constant, value: Float) -> Constant:
    """Replace `old`, which has no other consumer, under the same name: patterns select layers by it."""
    return surgeon.constant(old.name, np.ascontiguousarray(value, np.float32))


def _constant(graph: Graph, stem: str, value: Float) -> Constant:
    return surgeon.constant(surgeon.fresh(graph, stem), np.ascontiguousarray(value, np.float32))
