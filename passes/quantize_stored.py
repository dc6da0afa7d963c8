"""Weights in integers where all else stays in float: what no product unfolds (rdoq_onnx/analysis/stored_weights.py).

    a weight      INT8 integers ─ Cast ─ Cast ─ Mul by the scales ─ whatever reads it, in subgraphs, too
    a table       INT8 integers ─ Gather ─ Cast ─ Mul          the rows that are asked for are decoded, and no others
                         scales ─ Gather ──────┘

The first folds to a float weight when a session is made, which a DequantizeLinear does not: decoding a cell's
weights at each inference would take longer than the cell itself. It goes through INT32, as OpenVINO keeps what it takes
for a dequantization, and then refuses the cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor
from rdoq_onnx.passes import Pass


@dataclass(frozen=True)
class StoredWeight:
    """An initializer by name, its integers, int8 in its shape, and its scales, float32, which broadcast to that."""

    name: str
    integers: NDArray[np.int8]
    scales: NDArray[np.float32]


@dataclass(frozen=True)
class QuantizeStored(Pass):
    """Store `weights`, which are no outputs of any graph, as integers and scales. Leaves no float copy of them."""

    weights: Sequence[StoredWeight]

    def __call__(self, model: ModelProto) -> ModelProto:
        def store(graph: Graph) -> None:
            graphs = [graph, *graph.bodies]
            tensors = surgeon.all_tensors(graph)
            places = {id(node): g for g in graphs for node in g.nodes}
            for weight in self.weights:
                _store(graph, tensors[weight.name], weight, places)

        return surgeon.edit(model, store)


def _store(graph: Graph, tensor: Constant, weight: StoredWeight, places: Mapping[int, Graph]) -> None:
    """places: the graph that each node stands in, by its `id`."""
    stem = weight.name
    integers = surgeon.constant(surgeon.fresh(graph, f"{stem}_quantized"), weight.integers)
    readers = list(tensor.outputs)
    if weight.scales.size == len(weight.scales) and all(_looks_up(node, tensor) for node in readers):
        scales = surgeon.constant(surgeon.fresh(graph, f"{stem}_scale"), weight.scales)
        for node in readers:
            _decode_rows(places[id(node)], node, integers, scales)
        return
    short = weight.scales.reshape(weight.scales.shape[_leading_ones(weight.scales.shape) :])
    scales = surgeon.constant(surgeon.fresh(graph, f"{stem}_scale"), short)
    wide = surgeon.append(graph, "Cast", [integers], f"{stem}_Cast", attrs={"to": TensorProto.INT32})
    numbers = surgeon.append(graph, "Cast", [wide], f"{stem}_Cast", attrs={"to": TensorProto.FLOAT})
    decoded = surgeon.append(graph, "Mul", [numbers, scales], f"{stem}_Mul")
    for node in readers:
        for k, given in enumerate(node.inputs):
            if given is tensor:
                node.inputs[k] = decoded


def _leading_ones(shape: tuple[int, ...]) -> int:
    return next((k for k, size in enumerate(shape) if size > 1), len(shape))


def _looks_up(node: Node, table: Tensor) -> bool:
    return node.op == "Gather" and node.inputs[0] is table and not node.attrs.get("axis", 0)


def _decode_rows(graph: Graph, node: Node, integers: Tensor, scales: Tensor) -> None:
    """Let `node`, which looks up rows of a float table, multiply those of `integers` with theirs of `scales`."""
    index = node.inputs[1]
    rows = surgeon.append(graph, "Gather", [integers, index], f"{node.name}_integers")
    numbers = surgeon.append(graph, "Cast", [rows], f"{node.name}_Cast", attrs={"to": TensorProto.FLOAT})
    factors = surgeon.append(graph, "Gather", [scales, index], f"{node.name}_scales")
    node.op, node.attrs = "Mul", {}
    node.inputs = [numbers, factors]
