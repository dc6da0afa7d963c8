"""The network to quantize: layers, activations and the rules of the target."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.analysis.weight_only import WeightOnly
from rdoq_onnx.model import external
from rdoq_onnx.model.graph import Graph, downstream
from rdoq_onnx.model.layers import Activation, Layer
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_adds import InsertAdds
from rdoq_onnx.targets import TARGETS, Target


@dataclass(frozen=True)
class Network:
    """The layers and activations of `model`, in graph order, and the target whose rules apply.

    skipped: nodes with weights that stay in float. weight_only: weights quantized outside the search.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    skipped: tuple[Skip, ...]
    target: Target = TARGETS["onnxruntime"]
    weight_only: tuple[WeightOnly, ...] = ()

    def rows(self, layer: Layer) -> NDArray[np.float32]:
        """The float weights of `layer` as rows, [units, K]."""
        return layer.linear.rows(external.values(self._initializers[layer.weight]))

    @cached_property
    def sites(self) -> Mapping[str, str]:
        """For each activation, the tensor where first-order sensitivity is measured: after MaxPools.

        A MaxPool that is the only consumer commutes with the quantizer and leaves fewer elements.
        """
        graph = Graph(self.model)
        return {a.tensor: downstream(a.tensor, graph, lambda node: node.op_type == "MaxPool") for a in self.activations}

    @cached_property
    def _initializers(self) -> dict[str, TensorProto]:
        return {t.name: t for t in self.model.graph.initializer}


def layer_names(layer: Layer) -> tuple[str, ...]:
    """The names that `--pin` and `--exclude` accept for a layer: those of its nodes and its weight."""
    return (*(u.node for u in layer.uses), layer.weight)


def modified(network: Network) -> onnx.ModelProto:
    """F̃ of the supplement (Fig. 1, Eq. 2), with an Add after every activation and every layer's output."""
    outputs = [u.output for layer in network.layers for u in layer.uses]
    return run_passes([InsertAdds([a.tensor for a in network.activations], outputs)], network.model)
