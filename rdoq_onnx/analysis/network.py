"""The network to quantize: layers, activations and the rules of the target."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.shape_inference import infer_shapes

from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.model import external
from rdoq_onnx.model.graph import Graph, downstream
from rdoq_onnx.model.layers import Activation, Layer, Product, Tie
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_adds import InsertAdds
from rdoq_onnx.targets import TARGETS, Target

_INFERRED = 1024  # elements of a constant that shape inference may read


@dataclass(frozen=True)
class Network:
    """The layers and activations of `model`, in graph order, and the target whose rules apply.

    skipped: nodes with weights that stay in float. stored: weights that no product unfolds (stored_weights.py). ties:
    tables that have the integers of a layer. products: MatMuls of two activations that may run on integers.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    skipped: tuple[Skip, ...]
    target: Target = TARGETS["onnxruntime"]
    stored: tuple[Layer, ...] = ()
    ties: tuple[Tie, ...] = ()
    products: tuple[Product, ...] = ()

    @property
    def searched(self) -> tuple[Layer, ...]:
        """All weights whose widths the search chooses: those of `layers`, then those `stored`."""
        return (*self.layers, *self.stored)

    @property
    def unmultiplied(self) -> tuple[Layer, ...]:
        """All weights that no product unfolds: those `stored`, and tables tied to layers."""
        return (*self.stored, *(tie.table for tie in self.ties))

    @property
    def weights(self) -> tuple[Layer, ...]:
        """All weights that are quantized."""
        return (*self.layers, *self.unmultiplied)

    def names(self, layer: Layer) -> tuple[str, ...]:
        """The names that `--pin` and `--exclude` accept for a layer, among them those of tables tied to it."""
        return (*layer.names, *(n for tie in self.ties if tie.layer == layer.name for n in tie.table.names))

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
    def hard_swish_inputs(self) -> frozenset[str]:
        """The fusion tensors that only a HardSwish reads, if the target computes that on integers."""
        if not self.target.hard_swish:
            return frozenset()
        consumers = {a.tensor: Graph(self.model).sole_consumer(a.tensor) for a in self.activations if a.fusion}
        return frozenset(t for t, node in consumers.items() if node is not None and node.op_type == "HardSwish")

    @cached_property
    def last_axes(self) -> Mapping[str, int]:
        """The size of the last axis of each tensor where shape inference knows it."""
        try:
            graph = infer_shapes(weights_as_inputs(self.model, larger_than=_INFERRED), data_prop=True).graph
        except Exception:  # it rejects many models that run
            graph = self.model.graph
        infos = [*graph.value_info, *graph.input, *graph.output]
        shapes = {info.name: info.type.tensor_type.shape.dim for info in infos}
        return {name: dims[-1].dim_value for name, dims in shapes.items() if dims and dims[-1].dim_value > 0}

    @cached_property
    def _initializers(self) -> dict[str, TensorProto]:
        return {t.name: t for t in self.model.graph.initializer}


def modified(network: Network) -> onnx.ModelProto:
    """F̃ of the supplement (Fig. 1, Eq. 2), with an Add after every activation and every layer's output."""
    outputs = [u.output for layer in network.layers for u in layer.uses]
    return run_passes([InsertAdds([a.tensor for a in network.activations], outputs)], network.model)
