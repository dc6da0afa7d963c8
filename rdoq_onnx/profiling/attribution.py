"""Attribute the time of each node of an optimized graph to a layer.

Fusion renames nodes: what computes a layer bears its name, or the name of a tensor that the layer's output flows into.
A conversion (quantizers, layouts) serves the layer behind it, everything else the one in front of it.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np
import onnx

from rdoq_onnx.model.graph import Graph

CONVERSIONS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ReorderInput", "Transpose", "Cast", "Pad"}
)
_COMPUTE = re.compile("Conv|Gemm|MatMul|Attention")
_LAYOUT = "_nchwc"  # suffix of a tensor in ONNX Runtime's blocked layout


def times_by_node(
    model: onnx.ModelProto, optimized: onnx.ModelProto, seconds: Mapping[str, list[float]], nodes: Collection[str]
) -> dict[str, float]:
    """Return the seconds of each of `nodes` of `model`; their sum is that of all nodes.

    Of runs the first quartile counts, as other load only adds.

    optimized: the graph that ran. seconds: of each of its nodes in each run, by name.
    """
    taken = {n.name: float(np.quantile(seconds[n.name], 0.25)) for n in optimized.graph.node if n.name in seconds}
    labels = _labels(model, optimized, nodes)
    result = dict.fromkeys(nodes, 0.0)
    for name, value in taken.items():
        if labels.get(name) is not None:
            result[labels[name]] += value
    whole, attributed = sum(taken.values()), sum(result.values())
    scale = whole / attributed if attributed else 0.0
    return {name: value * scale for name, value in result.items()}


def _labels(model: onnx.ModelProto, optimized: onnx.ModelProto, nodes: Collection[str]) -> dict[str, str]:
    """Return the node of `nodes` that each node of the optimized graph serves, by name."""
    labels = _computing(model, optimized, nodes)
    graph = Graph(optimized)
    for node in reversed(graph.nodes):  # conversions first: they belong to what follows
        behind = [labels[c.name] for o in node.output for c in graph.consumers.get(o, []) if c.name in labels]
        if node.name not in labels and behind and node.op_type in CONVERSIONS:
            labels[node.name] = behind[0]
    for node in graph.nodes:
        before = [labels[p.name] for i in node.input if (p := graph.producer.get(i)) and p.name in labels]
        if node.name not in labels and before:
            labels[node.name] = before[0]
    for node in reversed(graph.nodes):
        behind = [labels[c.name] for o in node.output for c in graph.consumers.get(o, []) if c.name in labels]
        if node.name not in labels and behind:
            labels[node.name] = behind[0]
    return labels


def _computing(model: onnx.ModelProto, optimized: onnx.ModelProto, nodes: Collection[str]) -> dict[str, str]:
    """Find the nodes that compute `nodes`: by their names, then by the tensors that they produce."""
    labels: dict[str, str] = {}
    for node in optimized.graph.node:
        prefixes = [node.name, *(node.name[: end.start()] for end in re.finditer("_token_|/", node.name))]
        named = [name for name in prefixes if name in nodes]
        if named:
            labels[node.name] = max(named, key=len)
    graph, claimed = Graph(model), set(labels.values())
    for node in optimized.graph.node:
        if node.name in labels or not _COMPUTE.search(node.op_type):
            continue
        for tensor in (o.removesuffix(_LAYOUT) for o in (node.name, *node.output)):
            source = _source(tensor, graph, nodes, claimed)
            if source is not None:
                labels[node.name] = source
                claimed.add(source)
                break
    return labels


def _source(tensor: str, graph: Graph, nodes: Collection[str], claimed: Collection[str]) -> str | None:
    """Find the nearest of `nodes` upstream of `tensor` that is not claimed yet."""
    pending, seen = [tensor], {tensor}
    while pending:
        node = graph.producer.get(pending.pop(0))
        if node is None:
            continue
        if node.name in nodes:
            if node.name not in claimed:
                return str(node.name)
            continue
        new = [i for i in node.input if i not in seen]
        pending += new
        seen.update(new)
    return None
