"""Scale and bias of each output channel, fitted to the float network at the inputs that the quantized one really has.

What reaches a layer of the quantized network carries noise and has been clipped, so its outputs z' have another mean
and another gain than those of the float network, z. The least squares line through both,

    z ≈ α z' + β,    α = Cov(z, z') / Var(z'),    β = E[z] - α E[z'],

costs nothing in the emitted file: α goes into the channel's weight scale, β into its bias.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.analysis import Layer, Network
from rdoq_onnx.budget import Allocation
from rdoq_onnx.emission import chosen_weights, quantized_model
from rdoq_onnx.observation import with_outputs
from rdoq_onnx.quantizer import WeightCodes, stored
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples

_POSITIONS = 1024  # of a sample that are looked at, about
_LEAST, _MOST = 0.5, 1.5  # gains beyond say more of the samples than of the channel

Float = NDArray[np.float64]


def refitted(allocation: Allocation, portion: NDArray[np.int64], samples: Samples, runtime: Runtime) -> Allocation:
    """`allocation` with scale and bias of the layers of `portion` (indices) fitted on `samples`."""
    measurement = allocation.measurement
    network, size = measurement.network, measurement.observation.batching.size
    chosen = chosen_weights(allocation)
    layers = [(int(k), network.layers[k], chosen[k][2]) for k in portion if _fits(network.layers[k])]
    if not layers:
        return allocation
    names = [layer.uses[0].output for _, layer, _ in layers]
    sums = [_Line(layer) for _, layer, _ in layers]
    emitted = quantized_model(allocation)
    renamed = {n.name: n.output[0] for n in emitted.graph.node}
    pair = (
        runtime.session(with_outputs(network.model, names), "all"),
        runtime.session(with_outputs(emitted, [renamed[layer.uses[0].node] for _, layer, _ in layers]), "all"),
    )
    for count, feeds in samples.counted_batches(size):
        for line, z, q in zip(sums, *(session.run(feeds) for session in pair), strict=True):
            line.add(z, q, count)
    codes, offsets = list(measurement.codes), list(measurement.offsets)
    for (k, layer, shift), line in zip(layers, sums, strict=True):
        bias = _bias(network, layer)
        # The Add behind a MatMul has the shift, so its z' does not.
        gain, rest = line.fit(shift if layer.linear.op_type == "MatMul" else np.zeros_like(shift))
        codes[k] = {b: WeightCodes(c.integers, stored(c.scales * gain).astype(np.float32)) for b, c in codes[k].items()}
        unscaled = _shift_without_offset(replace(allocation, measurement=replace(measurement, codes=tuple(codes))), k)
        offsets[k] = gain * (bias + shift) + rest - bias - unscaled
    return replace(allocation, measurement=replace(measurement, codes=tuple(codes), offsets=tuple(offsets)))


class _Line:
    """Running sums for the line of each output channel of a layer."""

    def __init__(self, layer: Layer) -> None:
        self._linear = layer.linear
        self._sums = np.zeros((4, layer.linear.channels))
        self._count = 0

    def add(self, z: NDArray[np.float32], q: NDArray[np.float32], samples: int) -> None:
        blocks = [self._linear.outputs(v, samples) for v in (z, q)]
        every = blocks[0].shape[-1] // _POSITIONS | 1  # odd, so as not to walk down one column of an image
        rows = (np.moveaxis(b[..., ::every], 0, 2) for b in blocks)
        target, found = (v.reshape(self._sums.shape[1], -1).astype(np.float64) for v in rows)
        self._count += found.shape[1]
        self._sums += [target.sum(axis=1), found.sum(axis=1), (found * found).sum(axis=1), (target * found).sum(axis=1)]

    def fit(self, shift: Float) -> tuple[Float, Float]:
        """(α, β) of each channel for z' + shift; α is 1 where the channel hardly varies."""
        target, found, square, product = self._sums / self._count
        variance, covariance = square - found**2, product - target * found
        steady = variance <= 1e-9 * np.maximum(square, 1e-30)
        gain = np.where(steady, 1.0, np.clip(covariance / np.where(steady, 1.0, variance), _LEAST, _MOST))
        return gain, target - gain * (found + shift)


def _fits(layer: Layer) -> bool:
    """Whether each output channel has a scale of its own, and the layer is applied once."""
    return len(layer.uses) == 1 and layer.linear.op_type != "ConvTranspose"


def _bias(network: Network, layer: Layer) -> Float:
    """The bias within the layer's own output, zero where it has none."""
    node = next(n for n in network.model.graph.node if n.name == layer.name)
    tensors = {t.name: t for t in network.model.graph.initializer}
    if len(node.input) < 3 or node.input[2] not in tensors:
        return np.zeros(layer.linear.channels)
    beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
    value = beta * numpy_helper.to_array(tensors[node.input[2]]).astype(np.float64)
    return np.broadcast_to(value.reshape(-1), (layer.linear.channels,))


def _shift_without_offset(allocation: Allocation, k: int) -> Float:
    """What emission adds to the bias of layer `k` by itself."""
    offset = allocation.measurement.offsets[k]
    shift = chosen_weights(allocation)[k][2]
    return shift if offset is None else shift - offset
