"""An allocation in, the quantized model out."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.analysis import Layer
from rdoq_onnx.budget import Allocation
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.quantizer import WeightCodes
from rdoq_onnx.version import __version__

METADATA = "rdoq_onnx"


def chosen_weights(allocation: Allocation) -> list[tuple[Layer, WeightCodes, NDArray[np.float64]]]:
    """Each layer with its codes as allocated, and what its bias takes up."""
    measurement = allocation.measurement
    tensors = {t.name: t for t in measurement.network.model.graph.initializer}
    result = []
    parts = zip(measurement.codes, allocation.layer_bits, measurement.means, measurement.offsets, strict=True)
    for layer, (codes, bits, mean, offset) in zip(measurement.network.layers, parts, strict=True):
        chosen = mixed(codes, bits)
        change = chosen.values - layer.linear.rows(numpy_helper.to_array(tensors[layer.weight]))
        shift = bias_shift(layer, change, mean)
        result.append((layer, chosen, shift if offset is None else shift + offset))
    return result


def mixed(codes: Mapping[int, WeightCodes], bits: NDArray[np.int64]) -> WeightCodes:
    """A layer's channels, each at its own width."""
    first = next(iter(codes.values()))
    integers, scales = first.integers.copy(), first.scales.copy()
    for width, code in codes.items():
        rows = bits == width
        integers[rows], scales[rows] = code.integers[rows], code.scales[rows]
    return WeightCodes(integers, scales)


def bias_shift(layer: Layer, change: NDArray[np.floating[Any]], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """-ΔW·E[x]: what the bias takes up of a change of the weights [units, K], for each of the layer's outputs."""
    shift: NDArray[np.float64] = -(layer.linear.grouped(change.astype(np.float64)) @ mean[..., None])
    return shift.reshape(-1)


def emit_model(allocation: Allocation, settings: dict[str, object]) -> onnx.ModelProto:
    """The network of `allocation` with its weights and activations quantized, as standard ONNX.

    settings: what metadata_props shall tell of how the file was made.
    """
    measurement = allocation.measurement
    network = measurement.network
    weights = [
        QuantizedWeight(layer, layer.linear.tensor(codes.integers), codes.scales, shift)
        for layer, codes, shift in chosen_weights(allocation)
    ]
    quantizers = [
        (activation, table[bits])
        for activation, table, bits in zip(
            network.activations, measurement.quantizers, allocation.activation_bits, strict=True
        )
    ]
    model = run_passes([InsertQDQ(weights, quantizers)], network.model)
    widths = {
        "weights": {x.name: b.tolist() for x, b in zip(network.layers, allocation.layer_bits, strict=True)},
        "activations": {
            a.tensor: b for a, b in zip(network.activations, allocation.activation_bits, strict=True)
        },
    }
    for key, value in (("version", __version__), ("settings", settings), ("widths", widths)):
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True)
        model.metadata_props.add(key=f"{METADATA}.{key}", value=text)
    return model
