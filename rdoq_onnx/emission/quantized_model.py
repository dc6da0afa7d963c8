"""Build the quantized network before packing, which trials run and emission stores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.passes import Pass, run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.passes.integer_hard_swish import IntegerHardSwish
from rdoq_onnx.passes.quantize_stored import QuantizeStored, StoredWeight


def chosen_weights(allocation: Allocation) -> list[tuple[Layer, WeightCodes, NDArray[np.float64]]]:
    """Return each layer with its codes at the allocated widths and the shift of its bias."""
    measurement = allocation.measurement
    result = []
    for each, bits in zip(measurement.layers, allocation.layer_bits, strict=True):
        chosen = mixed(each.codes, bits)
        change = chosen.change(measurement.network.rows(each.layer))
        shift = bias_shift(each.layer, change, each.mean)
        result.append((each.layer, chosen, shift if each.offset is None else shift + each.offset))
    return result


def mixed(codes: Mapping[int, WeightCodes], bits: NDArray[np.int64]) -> WeightCodes:
    """Combine the codes of a layer's widths, each channel at its own."""
    if isinstance(codes, SpooledCodes):
        return codes.chosen(bits)
    first = next(iter(codes.values()))
    integers, scales = first.integers.copy(), first.scales.copy()
    for width, code in codes.items():
        rows = bits == width
        integers[rows], scales[rows] = code.integers[rows], code.scales[rows]
    return WeightCodes(integers, scales)


def bias_shift(layer: Layer, change: NDArray[np.floating[Any]], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return -ΔW·E[x], the bias correction of a change of the weights [units, K], for each of the layer's outputs."""
    shift: NDArray[np.float64] = -(layer.linear.grouped(change.astype(np.float64)) @ mean[..., None])
    return shift.reshape(-1)


def quantized_model(allocation: Allocation) -> onnx.ModelProto:
    """Quantize weights and activations of the network of `allocation`: INT8 weights, all channels kept.

    The model is not checked here; `emit_model` checks what becomes a file.
    """
    measurement = allocation.measurement
    network = measurement.network
    chosen = chosen_weights(allocation)
    weights = [
        QuantizedWeight(layer, layer.linear.tensor(codes.integers), codes.scales, shift)
        for layer, codes, shift in chosen
        if not layer.linear.axes
    ]
    by_name = {layer.name: codes for layer, codes, _ in chosen}
    stored = [stored_weight(layer, by_name[layer.name]) for layer in network.stored]
    stored += [stored_weight(tie.table, by_name[tie.layer]) for tie in network.ties]
    quantizers = [
        (each.activation, each.quantizers[bits])
        for each, bits in zip(measurement.activations, allocation.activation_bits, strict=True)
    ]
    target = network.target
    step = InsertQDQ(weights, quantizers, target.integer_biases, target.folds, measurement.observation.metric.outputs)
    steps: list[Pass] = [step]
    if network.hard_swish_inputs:
        steps.append(IntegerHardSwish())
    if stored:
        steps.append(QuantizeStored(stored))
    return run_passes(steps, network.model, checked=False)


def stored_weight(layer: Layer, codes: WeightCodes) -> StoredWeight:
    """Return a weight that no product unfolds as QuantizeStored takes it."""
    linear = layer.linear
    scales = codes.scales.reshape([size if k in linear.axes else 1 for k, size in enumerate(linear.shape)])
    return StoredWeight(layer.weight, linear.tensor(codes.integers), scales)
