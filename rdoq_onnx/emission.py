"""An allocation in, the quantized model out."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from rdoq_onnx.analysis import Layer, Network
from rdoq_onnx.budget import Allocation
from rdoq_onnx.passes import Pass, run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.passes.pack_vectors import PackVectors
from rdoq_onnx.passes.pack_weights import PackWeights
from rdoq_onnx.passes.quantize_stored import QuantizeStored, StoredWeight
from rdoq_onnx.passes.remove_channels import RemoveChannels, removable
from rdoq_onnx.passes.shorten_names import ShortenNames
from rdoq_onnx.protos import all_names
from rdoq_onnx.quantizer import WeightCodes, quantize_rows
from rdoq_onnx.targets import Storage
from rdoq_onnx.version import __version__
from rdoq_onnx.weight_only import BITS, WeightOnly

METADATA = "rdoq_onnx"
# ONNX Runtime runs a convolution of 30 channels slower than one of 32, and of 24 nearly as fast as its share says.
_MULTIPLE = 8
_REACH = 127  # magnitude of integers that meet float data


@dataclass(frozen=True)
class Emission:
    """A file, and what its making decided.

    removed: for each layer's node, the output channels that were folded away. kept: for each layer's node, channels of
    0 bits that stay, each with the reason.
    """

    model: onnx.ModelProto
    storage: Storage
    removed: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[tuple[int, str], ...]]


def chosen_weights(allocation: Allocation) -> list[tuple[Layer, WeightCodes, NDArray[np.float64]]]:
    """Each layer with its codes as allocated, and what its bias takes up."""
    measurement = allocation.measurement
    result = []
    parts = zip(measurement.codes, allocation.layer_bits, measurement.means, measurement.offsets, strict=True)
    for layer, (codes, bits, mean, offset) in zip(measurement.network.layers, parts, strict=True):
        chosen = mixed(codes, bits)
        change = chosen.values - measurement.network.rows(layer)
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


def quantized_model(allocation: Allocation) -> onnx.ModelProto:
    """The network of `allocation` with its weights and activations quantized: INT8 weights, all channels kept.

    Not checked: what becomes a file, `emit_model` checks.
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
    target = network.target
    step = InsertQDQ(weights, quantizers, target.integer_biases, target.folds)
    return run_passes([step], network.model, checked=False)


def emit_model(
    allocation: Allocation,
    settings: Mapping[str, object],
    storage: Storage | None = None,
    keep_channels: bool = False,
    plain: onnx.ModelProto | None = None,
) -> Emission:
    """The file of `allocation`: channels of 0 bits folded away, weights stored as `storage` says.

    settings: what metadata_props shall tell of how the file was made. storage: None for the target's default.
    plain: the `quantized_model` of `allocation`, where it is at hand; it may be altered.
    """
    network = allocation.measurement.network
    plain = quantized_model(allocation) if plain is None else plain
    storage = storage or network.target.storages[0]
    removal = None if keep_channels else removable(plain, _MULTIPLE)
    model = run_passes([RemoveChannels(removal)] if removal is not None and removal.outputs else [], plain)
    unsearched = list(zip(network.weight_only, allocation.weight_only_bits, strict=True))
    model = _with_weight_only(model, [(w, bits) for w, bits in unsearched if bits < BITS])
    narrow = {t.name for t in model.graph.initializer}
    model = _with_weight_only(model, [(w, bits) for w, bits in unsearched if bits == BITS])
    if storage != "int8":
        model = _stored(model, storage, network, narrow)
    for key, value in (("version", __version__), ("settings", settings)):
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True)
        model.metadata_props.add(key=f"{METADATA}.{key}", value=text)
    return Emission(model, storage, removal.outputs if removal else {}, removal.kept if removal else {})


def _with_weight_only(model: onnx.ModelProto, found: Sequence[tuple[WeightOnly, int]]) -> onnx.ModelProto:
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


def _stored(
    model: onnx.ModelProto, storage: Literal["packed", "native"], network: Network, narrow: Collection[str]
) -> onnx.ModelProto:
    """`model` with what quantization added to `network` stored in fewer bytes, and under shorter names.

    narrow: initializers whose integers may need fewer than 8 bits. Packing a table for its few rows of zeros would cost
    more when it is loaded than it saves.
    """
    known = set(all_names(network.model.graph))
    added = [t for t in model.graph.initializer if t.name not in known]
    integers = [t.name for t in added if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    weights = [name for name in integers if name in narrow]
    vectors = [t.name for t in added if t.name not in integers]
    steps: list[Pass] = [PackWeights(weights, storage, network.target.int2), PackVectors(vectors), ShortenNames(known)]
    return run_passes(steps, model)
