"""Read from the optimized graph which kernels ONNX Runtime runs for a quantized model."""

import re

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.graph import Graph, after_clamps
from rdoq_onnx.model.layers import Layer, Use

# Operators that a layer becomes in float, and on integers.
_FLOAT = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_INTEGER = frozenset({"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul"})


def kernel_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Count the nodes of each operator."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def float_layers(optimized: onnx.ModelProto, network: Network) -> dict[str, str]:
    """List the nodes of quantized layers that ONNX Runtime runs without an integer kernel, with the reason."""
    graph, operators = Graph(network.model), _operators_by_origin(optimized)
    reasons = {}
    for layer in network.layers:
        for use in layer.uses:
            kernels = operators.get(use.node, set())
            if kernels & _FLOAT and not kernels & _INTEGER:
                reasons[use.node] = _why_float(layer, use, graph, bool(network.activations))
    return reasons


def _operators_by_origin(optimized: onnx.ModelProto) -> dict[str, set[str]]:
    """Group the operators of the optimized graph by their original node, whose name theirs begin with."""
    operators: dict[str, set[str]] = {}
    for node in optimized.graph.node:
        for name in (node.name, *(node.name[: end.start()] for end in re.finditer("_token_|/", node.name))):
            operators.setdefault(name, set()).add(node.op_type)
    return operators


def _why_float(layer: Layer, use: Use, graph: Graph, activations: bool) -> str:
    if not activations:
        return "activations are float"
    if layer.linear.op_type == "ConvTranspose":
        return "ONNX Runtime has no integer kernel for ConvTranspose"
    if after_clamps(use.output, graph) in graph.outputs:
        return "its output is an output of the model, but the integer convolution needs a quantized one"
    consumers = ", ".join(sorted({n.op_type for n in graph.consumers.get(use.output, [])}))
    return f"its output is read by {consumers}, in front of the quantizer"
