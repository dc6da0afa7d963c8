"""An allocation in, the quantized model out."""

import json

import onnx

from rdoq_onnx.budget import Allocation
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.version import __version__

METADATA = "rdoq_onnx"


def emit_model(allocation: Allocation, settings: dict[str, object]) -> onnx.ModelProto:
    """The network of `allocation` with its weights and activations quantized, as standard ONNX.

    settings: what metadata_props shall tell of how the file was made.
    """
    measurement = allocation.measurement
    network = measurement.network
    weights = []
    for layer, bits, codes in zip(network.layers, allocation.layer_bits, measurement.codes, strict=True):
        first = next(iter(codes.values()))
        integers, scales = first.integers.copy(), first.scales.copy()
        for width, code in codes.items():
            rows = bits == width
            integers[rows], scales[rows] = code.integers[rows], code.scales[rows]
        weights.append(QuantizedWeight(layer, layer.linear.tensor(integers), scales))
    chosen = [
        (activation, table[bits])
        for activation, table, bits in zip(
            network.activations, measurement.quantizers, allocation.activation_bits, strict=True
        )
    ]
    model = run_passes([InsertQDQ(weights, chosen)], network.model)
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
