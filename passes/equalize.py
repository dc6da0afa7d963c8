"""Channel scales moved from the layers that make a tensor to those that read it (see rdoq_onnx/equalization.py)."""

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

    made: factor of each output channel, by the name of the Conv or Gemm. read: factor that each of its input channels
    has been given, by name; its weights are divided by it. capped: factor of each channel of a Clip to 0..c, which
    becomes Relu and Min; [C, 1, ...] as it broadcasts to the output. No weight or bias may have other readers.
    """

    made: Mapping[str, Float]
    read: Mapping[str, Float]
    capped: Mapping[str, Float]

    def __call__(self, model: ModelProto) -> ModelProto:
        def scale(graph: Graph) -> None:
            for node in list(graph.nodes):
                if node.name in self.made or node.name in self.read:
                    _scale_layer(node, self.made.get(node.name), self.read.get(node.name))
                elif node.name in self.capped:
                    _cap(graph, node, self.capped[node.name])

        return surgeon.edit(model, scale)


def _scale_layer(node: Node, made: Float | None, read: Float | None) -> None:
    weight = node.inputs[1].values.astype(np.float64)
    by_output = weight if node.op == "Conv" or node.attrs.get("transB", 0) else weight.T
    flat = by_output.reshape(*by_output.shape[:2], -1)
    if made is not None:
        flat = flat * made[:, None, None]
        if len(node.inputs) > 2 and node.inputs[2].name:
            bias: Constant = node.inputs[2]
            node.inputs[2] = _scaled(bias, bias.values * made)
    if read is not None:
        groups = node.attrs.get("group", 1)
        split = flat.reshape(groups, -1, *flat.shape[1:])
        flat = (split / read.reshape(groups, 1, -1, 1)).reshape(flat.shape)
    scaled = flat.reshape(by_output.shape)
    node.inputs[1] = _scaled(node.inputs[1], scaled if by_output is weight else scaled.T)


def _cap(graph: Graph, node: Node, factor: Float) -> None:
    """Clip(x, 0, c) of unscaled channels -> Min(Relu(x), c·r) of scaled ones."""
    ceiling = float(node.inputs[2].values) * factor[None]
    output = node.outputs[0]
    floor = surgeon.append(graph, "Relu", [node.inputs[0]], f"{node.name}_Relu", like=output)
    node.op, node.attrs = "Min", {}
    node.inputs = [floor, _constant(graph, f"{node.name}_ceiling", ceiling)]


def _scaled(old: Constant, value: Float) -> Constant:
    """In place of `old`, which nothing else reads, and under its name: patterns know layers by it."""
    return surgeon.constant(old.name, np.ascontiguousarray(value, np.float32))


def _constant(graph: Graph, stem: str, value: Float) -> Constant:
    return surgeon.constant(surgeon.fresh(graph, stem), np.ascontiguousarray(value, np.float32))
