"""Store integers once that a table and a layer's weight have in common.

table    INT8 [V, K] ─ Gather ─ ...
weight   the same integers ─ [Transpose] ─ DequantizeLinear, or Cast and Mul ─ layer
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Graph, Tensor
from rdoq_onnx.passes import Pass


@dataclass(frozen=True)
class ShareTies(Pass):
    """Let weights read the integers of tables, and tables the scales of weights, wherever they are equal.

    ties: names of a float table and of a float weight. Assumes InsertQDQ and QuantizeStored, which name what they store
    after these.
    """

    ties: Sequence[tuple[str, str]]

    def __call__(self, model: ModelProto) -> ModelProto:
        def share(graph: Graph) -> None:
            tensors = graph.tensors()
            for table, weight in self.ties:
                parts = [tensors.get(f"{name}_{part}") for part in ("quantized", "scale") for name in (table, weight)]
                if all(part is not None for part in parts):
                    _share(graph, *parts)

        return surgeon.edit(model, share) if self.ties else model


def _share(graph: Graph, rows: Tensor, integers: Tensor, row_scales: Tensor, scales: Tensor) -> None:
    one, other = surgeon.values(rows), surgeon.values(integers)
    one_scale, other_scale = surgeon.values(row_scales), surgeon.values(scales)
    if any(v is None for v in (one, other, one_scale, other_scale)):
        return
    transposed = one.shape != other.shape or not np.array_equal(one, other)
    if transposed and not np.array_equal(one.T, other):
        return  # channels have been removed from the layer
    shared = rows
    if transposed:
        shared = surgeon.append(graph, "Transpose", [rows], f"{integers.name}_Transpose", attrs={"perm": [1, 0]})
    surgeon.insert_after(graph, integers, lambda _: shared, outputs=False)
    if np.array_equal(one_scale.reshape(-1), other_scale.reshape(-1)):
        shape = surgeon.constant(surgeon.fresh(graph, f"{row_scales.name}_shape"), np.array(one_scale.shape, np.int64))
        same = surgeon.append(graph, "Reshape", [scales, shape], f"{row_scales.name}_Reshape")
        surgeon.insert_after(graph, row_scales, lambda _: same, outputs=False)
