"""Which kernels ONNX Runtime makes of a quantized model: read off the graph that it optimized."""

import re

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.graph import Graph, after_clamps
from rdoq_onnx.model.layers import Layer, Use

# What a layer becomes in float, and on integers.
_FLOAT = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_INTEGER = frozenset({"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul"})


def kernel_counts(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator is in the graph."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def float_layers(optimized: onnx.ModelProto, network: Network) -> dict[str, str]:
    """Nodes of quantized layers that have no integer kernel in the graph that ONNX Runtime runs, with the reason."""
    graph, made = Graph(network.model), _made_of(optimized)
    found = {}
    for layer in network.layers:
        for use in layer.uses:
            kernels = made.get(use.node, set())
            if kernels & _FLOAT and not kernels & _INTEGER:
                found[use.node] = _why_float(layer, use, graph, bool(network.activations))
    return found


def _made_of(optimized: onnx.ModelProto) -> dict[str, set[str]]:
    """Operators of the optimized graph by the node that they were made of, which their names begin with."""
    made: dict[str, set[str]] = {}
    for node in optimized.graph.node:
        for name in (node.name, *(node.name[: end.start()] for end in re.finditer("_token_|/", node.name))):
            made.setdefault(name, set()).add(node.op_type)
    return made


def _why_float(layer: Layer, use: Use, graph: Graph, activations: bool) -> str:
    if not activations:
        return "activations are float"
    if layer.linear.op_type == "ConvTranspose":
        return "ONNX Runtime has no integer kernel for ConvTranspose"
    if after_clamps(use.output, graph) in graph.outputs:
        return "its output is the model's, and the integer convolution wants a quantized one"
    readers = ", ".join(sorted({n.op_type for n in graph.consumers.get(use.output, [])}))
    return f"its output is read by {readers}, which stands before the quantizer"
