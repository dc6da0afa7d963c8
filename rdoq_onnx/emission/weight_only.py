"""Quantize the weights of embedding tables, recurrent cells and stacks of matrices, whose data stay in float."""

import math
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.weight_only import WeightOnly
from rdoq_onnx.candidates.quantizer import quantize_rows
from rdoq_onnx.model import external
from rdoq_onnx.model.grid import Grid
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.quantize_stored import QuantizeStored, StoredWeight

_REACH = 127  # greatest magnitude of weight integers beside float data


def with_weight_only(model: onnx.ModelProto, widths: Sequence[tuple[WeightOnly, int]]) -> onnx.ModelProto:
    """Quantize weights outside the search, each to its number of bits."""
    tensors = {t.name: t for t in model.graph.initializer}
    weights = [stored_weight(w, bits, external.values(tensors[w.tensor])) for w, bits in widths]
    return run_passes([QuantizeStored(weights)], model) if weights else model


def stored_weight(weight: WeightOnly, bits: int, value: NDArray[np.float32]) -> StoredWeight:
    """Quantize `value` to `bits` bits, with one scale per index along the axes of `weight` that have scales."""
    rest = tuple(k for k in range(value.ndim) if k not in weight.axes)
    order = (*weight.axes, *rest)
    turned = value.transpose(order)
    units = turned.shape[: len(weight.axes)]
    rows = turned.reshape(math.prod(units), -1)
    codes = quantize_rows(rows, bits, _REACH, grid=Grid.of(rows))
    integers = codes.integers.reshape(turned.shape).transpose(np.argsort(order))
    scales = codes.scales.reshape([1 if k in rest else size for k, size in enumerate(value.shape)])
    return StoredWeight(weight.tensor, np.ascontiguousarray(integers), scales)
