"""Decide which consumers of an activation read it quantized, and which read the float tensor.

No integer kernel absorbs an Add before a LayerNormalization, the product with a gate, or the skip connection around a
whole network. A quantizer before such a node costs accuracy and a DequantizeLinear and saves nothing, so it reads the
float tensor. If an integer kernel produces the activation there is no float tensor, and all consumers read its output.
"""

from collections.abc import Collection

from onnx import NodeProto

from rdoq_onnx.model.graph import CLAMPS, SHAPE_OPS, Graph, after_clamps, is_movement


def quantized_consumers(
    graph: Graph, activations: Collection[str], quantized: Collection[str], integer: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """For each of `activations` with consumers that should read it in float: the nodes that read it quantized.

    quantized: the tensors that quantizers follow. integer: nodes known to compute on integers.
    """

    nodes = {n.name for n in graph.nodes if n.name in integer or fuses(n, graph, quantized)}
    inputs = {i for n in graph.nodes if n.name in nodes for i in n.input}
    for node in reversed(graph.nodes):
        if is_movement(node, graph) and not inputs.isdisjoint(node.output):
            nodes.add(node.name)
            inputs.add(node.input[0])
    produced = integer_outputs(graph, quantized)
    result = {}
    for tensor in activations:
        consumers = [n for n in graph.consumers.get(tensor, []) if n.op_type not in SHAPE_OPS]
        names = tuple(n.name for n in consumers if n.name in nodes)
        if tensor not in produced and len(names) < len(consumers):
            result[tensor] = names
    return result


def fuses(node: NodeProto, graph: Graph, quantized: Collection[str]) -> bool:
    """Whether `node` computes between quantizers: what it reads, and what it makes, is among the `quantized`."""
    if is_movement(node, graph) or not all(graph.root(i) in quantized for i in node.input if i):
        return False
    return all(after_clamps(o, graph) in quantized for o in node.output if o)


def integer_outputs(graph: Graph, quantized: Collection[str]) -> set[str]:
    """Outputs of integer kernels, which read only `quantized` data, and Concats of such outputs with other tensors."""
    outputs: set[str] = set()
    for node in graph.nodes:
        data = [i for i in node.input if i and i not in graph.constants]
        if node.op_type in CLAMPS or is_movement(node, graph):
            integer = node.input[0] in outputs
        elif node.op_type == "Concat":
            integer = not outputs.isdisjoint(data)
        else:
            integer = bool(data) and all(graph.root(i) in quantized for i in data)
        outputs.update(node.output if integer else ())
    return outputs
