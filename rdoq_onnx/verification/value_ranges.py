"""The ranges of weights and activations: of their float values, and of those that their integers stand for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.quantized_model import mixed

Range = tuple[float, float]  # the least and the greatest value


@dataclass(frozen=True)
class ValueRanges:
    """For each layer and each activation, (range in float, range of the quantized values).

    Weights are those of the equalized network. Ranges of activations in float were observed on samples; of the
    quantized ones it is what the quantizer can represent, so that the difference is what it clips.
    """

    layers: tuple[tuple[Range, Range], ...]
    activations: tuple[tuple[Range, Range], ...]


def value_ranges(allocation: Allocation) -> ValueRanges:
    """Read the ranges of what `allocation` quantizes; this reads every weight once."""
    measurement = allocation.measurement
    network, observed = measurement.network, measurement.observation.ranges
    layers = tuple(
        (_ends(network.rows(each.layer)), _ends(mixed(each.codes, bits).values))
        for each, bits in zip(measurement.layers, allocation.layer_bits, strict=True)
    )
    activations = tuple(
        (observed[each.activation.tensor], each.quantizers[bits].range)
        for each, bits in zip(measurement.activations, allocation.activation_bits, strict=True)
    )
    return ValueRanges(layers, activations)


def _ends(values: NDArray[np.float32]) -> Range:
    return float(values.min()), float(values.max())
