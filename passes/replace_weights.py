"""Replace weights by their dequantized values: a network with only its weights quantized."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.surgeon import Graph
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.correct_bias import add_to_bias


@dataclass(frozen=True)
class ReplaceWeights(Pass):
    """Give each layer its new weight, float32 in the weight's shape, and add its shift, [units], to the bias."""

    weights: Sequence[tuple[Layer, NDArray[np.float32], NDArray[np.float64]]]

    def __call__(self, model: ModelProto) -> ModelProto:
        def replace(graph: Graph) -> None:
            nodes = {n.name: n for n in graph.nodes}
            for layer, value, shift in self.weights:
                weight = surgeon.constant(surgeon.fresh(graph, layer.weight), value)
                for use in layer.uses:
                    nodes[use.node].inputs[layer.linear.weight_side] = weight
                    add_to_bias(graph, nodes[use.node], shift, layer.linear.weight_side)

        return surgeon.edit(model, replace)
