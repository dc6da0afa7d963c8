"""The quantized network as a differentiable graph whose weights, biases and quantizers are inputs.

    activation   â = s (round(clip(a / s + z, 0, 2^b - 1)) - z)
    weight       Ŵ = s q, computed outside (variables.py): the graph has one input for it
    bias         an input in place of the constant

With gates g in {0, 1}, a + g (â - a) takes the place of â, so that a quantizer may be left out for a while (QDrop,
Wei et al., ICLR 2022).

Round passes adjoints on unchanged (straight-through estimator) and Clip those inside its range, so that the adjoints of
s and z are those of LSQ+ (Bhalgat et al., 2020).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.quantized_model import chosen_weights
from rdoq_onnx.model import external
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.layers import Activation, Layer
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.model.protos import reads, rename, subgraphs_of
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.replace_weights import ReplaceWeights


@dataclass(frozen=True)
class Site:
    """An input of the graph that holds a weight, and how it unfolds into rows."""

    name: str
    linear: Linear


@dataclass(frozen=True)
class Parametrized:
    """The graph, and the names of its inputs.

    sites: of each layer's weight, by the layer's index. biases: of each bias that is tuned, likewise, with its value.
    scales, zeros: of the activations' quantizers, by index; a zero point of 0 has none. gates: of all quantizers, or
    none.
    """

    model: onnx.ModelProto
    sites: Mapping[int, tuple[Site, ...]]
    biases: Mapping[int, tuple[str, NDArray[np.float32]]]
    scales: Mapping[int, str]
    zeros: Mapping[int, str]
    gates: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs that adjoints are wanted of."""
        weights = [site.name for sites in self.sites.values() for site in sites]
        return [*weights, *(name for name, _ in self.biases.values()), *self.scales.values(), *self.zeros.values()]


def parametrized(allocation: Allocation, gated: bool = False) -> Parametrized:
    """Turn what is quantized in the network of `allocation` into inputs; with gates if `gated`.

    A weight that no adjoint rule reaches, such as that of a recurrent cell, stays a constant at its quantized value.
    """
    measurement = allocation.measurement
    network = measurement.aimed
    weights = [(layer, layer.linear.tensor(codes.values), shift) for layer, codes, shift in chosen_weights(allocation)]
    products = [each for each in weights if not each[0].linear.axes]
    editor = _Editor(run_passes([ReplaceWeights(products)], network.model, checked=False))
    tied = {tie.layer: tie.table for tie in network.ties}
    sites, biases = {}, {}
    for k, (layer, value, _) in enumerate(weights):
        shared = [layer, *([tied[layer.name]] if layer.name in tied else ())]
        for each in shared:
            if each.linear.axes:
                editor.replace(each, each.linear.tensor(layer.linear.rows(value)))
        found = [editor.weight_inputs(each) for each in shared]
        if all(found):
            sites[k] = tuple(site for each in found for site in each)
            if (bias := editor.bias_input(layer)) is not None:
                biases[k] = bias
    names = [
        editor.quantize(each.activation, each.quantizers[bits], gated)
        for each, bits in zip(measurement.activations, allocation.activation_bits, strict=True)
    ]
    scales = {k: scale for k, (scale, _) in enumerate(names)}
    zeros = {k: zero for k, (_, zero) in enumerate(names) if zero}
    gates = tuple(gate(each.activation.tensor) for each in measurement.activations) if gated else ()
    return Parametrized(editor.finished(), sites, biases, scales, zeros, gates)


def gate(tensor: str) -> str:
    """Return the name of the gate of a tensor's quantizer."""
    return f"{tensor}/gate"


class _Editor:
    """Edits `model` in place: initializers become inputs, and quantizers follow tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._graph = Graph(model)
        self._nodes = {n.name: n for n in model.graph.node}
        self._constants = {t.name: t for t in model.graph.initializer}
        self._inputs: dict[str, list[int]] = {}  # new ones, with their shapes
        self._behind: dict[str, list[NodeProto]] = {}  # by tensor, the nodes of its quantizer
        self._renamed: dict[str, str] = {}

    def replace(self, layer: Layer, value: NDArray[Any]) -> None:
        """Give a weight that no product unfolds its quantized `value`."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), layer.weight)
        self._constants[layer.weight].CopyFrom(tensor)

    def weight_inputs(self, layer: Layer) -> list[Site]:
        """Make the weight of each use of `layer` an input; return none if a use is of a kind without a rule."""
        names: dict[str, None] = {}
        for use in layer.uses:
            node = self._nodes.get(use.node)
            if node is None or (layer.linear.axes and node.op_type != "Gather"):
                return []
            names[node.input[0 if layer.linear.axes else layer.linear.weight_side]] = None
        if not all(name in self._constants for name in names):
            return []
        for name in names:
            self._inputs[name] = list(self._constants[name].dims)
        return [Site(name, layer.linear) for name in names]

    def bias_input(self, layer: Layer) -> tuple[str, NDArray[np.float32]] | None:
        """Make the constant that is added to a layer's outputs an input, if it has one of its own; return its value."""
        if len(layer.uses) != 1 or layer.linear.axes or layer.linear.op_type == "ConvTranspose":
            return None
        node = self._nodes[layer.uses[0].node]
        name = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "MatMul":
            consumer = self._graph.sole_consumer(node.output[0])
            added = consumer.input if consumer is not None and consumer.op_type == "Add" else ()
            name = next((i for i in added if i in self._constants), "")
        plain = all(a.f == 1.0 for a in node.attribute if a.name in ("alpha", "beta"))
        tensor = self._constants.get(name)
        if not plain or tensor is None or len(self._graph.consumers[name]) != 1:
            return None
        if int(np.prod(tensor.dims)) != layer.linear.channels:
            return None
        self._inputs[name] = list(tensor.dims)
        return name, external.values(tensor).astype(np.float32)

    def quantize(self, activation: Activation, quantizer: Affine, gated: bool) -> tuple[str, str]:
        """Put a quantizer behind a tensor, for all that read it; return its inputs, "" without a zero point."""
        tensor, low = activation.tensor, quantizer.low - quantizer.zero_point
        scale, zero = f"{tensor}/scale", f"{tensor}/zero point" if low else ""
        self._inputs |= {name: [1] for name in (scale, zero, gate(tensor) if gated else "") if name}
        first = quantizer.low if low else 0
        bounds = [
            self._constant(f"{tensor}/{end}", value)
            for end, value in (("low", first), ("high", first + quantizer.high - quantizer.low))
        ]
        steps = [("Div", [tensor, scale]), ("Add", ["", zero]), ("Clip", ["", *bounds]), ("Round", [""])]
        steps += [("Sub", ["", zero]), ("Mul", ["", scale])]
        if gated:
            steps += [("Sub", ["", tensor]), ("Mul", ["", gate(tensor)]), ("Add", ["", tensor])]
        nodes: list[NodeProto] = []
        last = ""
        for op_type, inputs in steps:
            if inputs[-1] == zero == "" and len(inputs) == 2:
                continue
            output = f"{tensor}/quantizer {len(nodes)}"
            nodes.append(helper.make_node(op_type, [name or last for name in inputs], [output], output))
            last = output
        self._behind[tensor], self._renamed[tensor] = nodes, last
        return scale, zero

    def finished(self) -> onnx.ModelProto:
        """Return the edited model."""
        graph = self._model.graph
        nodes = [node for value in graph.input for node in self._behind.get(value.name, ())]
        for node in graph.node:
            self._redirect(node)
            nodes += [node, *(n for name in node.output for n in self._behind.get(name, ()))]
        result = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        result.graph.name = graph.name
        result.graph.node.extend(nodes)
        result.graph.output.extend(graph.output)
        result.graph.initializer.extend(t for t in graph.initializer if t.name not in self._inputs)
        result.graph.input.extend(i for i in graph.input if i.name not in self._inputs)
        result.graph.input.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in self._inputs.items()
        )
        return result

    def _redirect(self, node: NodeProto) -> None:
        for k, name in enumerate(node.input):
            node.input[k] = self._renamed.get(name, name)
        for inner in subgraphs_of(node):
            rename(inner.node, {name: self._renamed[name] for name in reads(inner.node) if name in self._renamed})

    def _constant(self, name: str, value: float) -> str:
        self._model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name
