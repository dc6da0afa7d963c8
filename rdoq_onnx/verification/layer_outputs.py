"""Compare each layer's output in the emitted model with the float network's: where along the network errors grow.

    SQNR = 10 log10(Σ y² / Σ (ỹ - y)²),    sums over the elements of y on all samples

Everything in front of a layer is quantized as well. The float network is the equalized one, whose tensors have the
emitted model's scales.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.system.runtime import Runtime

SAMPLES = 8  # maximum number
_MEMORY = 256 << 20  # bytes of the float outputs that wait for those of the emitted model; at least one sample's
_FLOAT_BYTES = 4

Array = NDArray[Any]


@dataclass(frozen=True)
class LayerOutputs:
    """The SQNR in dB of each layer's output, None where the emitted model has no such tensor, on `samples` samples."""

    sqnr_db: tuple[float | None, ...]
    samples: int


def compare_layers(emission: Emission, measurement: Measurement, held_out: Samples, runtime: Runtime) -> LayerOutputs:
    """Compare the outputs of all layers that the search quantized, in the order of `network.searched`."""
    network, size = measurement.network, measurement.observation.batching.size
    names = [layer.uses[0].output for layer in network.searched]
    both = _computed(network.model) & _computed(emission.model)
    fetched = list(dict.fromkeys(name for name in names if name in both))
    samples = held_out.some(_affordable(measurement, fetched))
    if not fetched:
        return LayerOutputs((None,) * len(names), len(samples))
    # One session after the other: together two large models may not fit in memory.
    before = _runs(network.model, fetched, samples, size, runtime)
    after = _runs(emission.model, fetched, samples, size, runtime)
    removed = {use.output: emission.removed.get(use.node, ()) for x in network.searched for use in x.uses}
    found = {name: _sqnr(before[name], after[name], removed.get(name, ())) for name in fetched}
    return LayerOutputs(tuple(found.get(name) for name in names), len(samples))


def _computed(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output if name}


def _affordable(measurement: Measurement, names: Sequence[str]) -> int:
    """Return the number of samples whose tensors `names` fit the memory."""
    each = _FLOAT_BYTES * sum(measurement.observation.sizes.get(name, 0) for name in names)
    return min(max(_MEMORY // max(each, 1), 1), SAMPLES)


def _runs(
    model: onnx.ModelProto, names: Sequence[str], samples: Samples, size: int, runtime: Runtime
) -> Mapping[str, list[Array]]:
    """Return the values of tensors of `model` in each batch, at the level that does not fuse."""
    session = runtime.session(with_outputs(model, names), "basic")
    batches = [session.run(feeds, names) for feeds in samples.batches(size)]
    return {name: [values[k] for values in batches] for k, name in enumerate(names)}


def _sqnr(before: Sequence[Array], after: Sequence[Array], removed: Sequence[int]) -> float | None:
    """Return the SQNR of a tensor, on the channels that were not removed; None if its shape is another."""
    signal = noise = 0.0
    for expected, value in zip(before, after, strict=True):
        kept = _without(expected, removed, value.shape)
        if kept.shape != value.shape:
            return None
        exact = kept.astype(np.float64)
        signal += float(np.square(exact).sum())
        noise += float(np.square(value - exact).sum())
    return decibels(signal, noise)


def _without(value: Array, removed: Sequence[int], shape: tuple[int, ...]) -> Array:
    """Take the `removed` channels away, along the axis on which `value` has as many more than `shape`."""
    axes = [k for k, (a, b) in enumerate(zip(value.shape, shape, strict=False)) if a != b]
    return np.delete(value, removed, axes[0]) if len(axes) == 1 and removed else value


def decibels(signal: float, noise: float) -> float | None:
    """Return the ratio in dB: infinite without noise, None without a signal."""
    if not signal:
        return None
    return 10 * math.log10(signal / noise) if noise else math.inf
