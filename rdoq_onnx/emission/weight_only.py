"""Tables, recurrent weights and stacks, quantized in their weights alone."""

import math
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.analysis.weight_only import WeightOnly
from rdoq_onnx.candidates.quantizer import quantize_rows
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.quantize_stored import QuantizeStored, StoredWeight

_REACH = 127  # magnitude of integers that meet float data


def with_weight_only(model: onnx.ModelProto, found: Sequence[tuple[WeightOnly, int]]) -> onnx.ModelProto:
    """`model` with these weights, which the search does not reach, in so many bits each."""
    tensors = {t.name: t for t in model.graph.initializer}
    weights = [stored_weight(w, bits, numpy_helper.to_array(tensors[w.tensor])) for w, bits in found]
    return run_passes([QuantizeStored(weights)], model) if weights else model


def stored_weight(found: WeightOnly, bits: int, value: NDArray[np.float32]) -> StoredWeight:
    """`value` in integers of `bits` bits, with a scale for each index along the axes that have scales of their own."""
    rest = tuple(k for k in range(value.ndim) if k not in found.axes)
    order = (*found.axes, *rest)
    turned = value.transpose(order)
    units = turned.shape[: len(found.axes)]
    codes = quantize_rows(turned.reshape(math.prod(units), -1), bits, _REACH)
    integers = codes.integers.reshape(turned.shape).transpose(np.argsort(order))
    scales = codes.scales.reshape([1 if k in rest else size for k, size in enumerate(value.shape)])
    return StoredWeight(found.tensor, np.ascontiguousarray(integers), scales)
