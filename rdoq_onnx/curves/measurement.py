"""The result of measuring a network: its curves, and the candidates that they describe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.layers import Activation, Layer
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.system.scratch import Scratch

Float = NDArray[np.float64]
OptionCurves = tuple[Float, tuple[tuple[Float, ...], ...]]  # the curves of what is chosen, of all options of each layer


@dataclass(frozen=True)
class FloatFallback:
    """What stays in float: activations by tensor and layers by name.

    Values are δ at full width as a share of the signal's power; 0 for what gets no element from any sample. slow:
    activations whose layers are faster in float.
    """

    tensors: Mapping[str, float]
    layers: Mapping[str, float]
    slow: tuple[str, ...] = ()

    def __or__(self, other: "FloatFallback") -> "FloatFallback":
        slow = tuple(dict.fromkeys((*self.slow, *other.slow)))
        return FloatFallback({**self.tensors, **other.tensors}, {**self.layers, **other.layers}, slow)


@dataclass(frozen=True)
class BlockOption:
    """The channels of a layer at each offered width, `size` weights to a scale (see `Layer.blocks`), and their curves.

    distortion: [units, 9], as in Curves.
    """

    size: int
    codes: Mapping[int, WeightCodes]
    distortion: Float


@dataclass(frozen=True)
class MeasuredLayer:
    """The best candidates of one layer.

    codes: its channels at each offered width. mean: mean input [G, K], for the bias correction. offset: a further
    correction added to its outputs, or None. block: the weights that share a scale, see `Layer.blocks`. options: what
    `allocation/block_sizes.py` chooses codes and block from, if there is more than one.
    """

    layer: Layer
    codes: Mapping[int, WeightCodes]
    mean: Float
    offset: Float | None = None
    block: int = 0
    options: tuple[BlockOption, ...] = ()


@dataclass(frozen=True)
class MeasuredActivation:
    """An activation's quantizer at each width, with the clipping of least distortion."""

    activation: Activation
    quantizers: Mapping[int, Affine]


@dataclass(frozen=True)
class Unit:
    """A layer or an activation: its name, all names that patterns match, and its rows of the curves."""

    kind: Literal["layer", "activation"]
    name: str
    names: tuple[str, ...]
    rows: slice
    fusion: bool = False


@dataclass(frozen=True)
class Measurement:
    """The curves of a network, and the candidates that they describe.

    source: the normalized model. network: the equalized model, and what to quantize in it. layers, activations: the
    best candidates for all that `network` searches, in its order. curves: a row per channel of each layer, in order,
    then one per activation; columns are 0 to 8 bits. fallback: what stays in float. probed: tensors without an adjoint,
    measured exactly instead, with the reason. seen: the number of rows that the samples look up in each table, by name.
    scratch: the folder of what is too large for memory, which lives as long.
    divergence: that of rows of logits over the squared error for each row of the curves, where it is weighed, else NaN.
    unanchored: the curves, and those of each layer's options, before they were anchored to exact runs; None if not.
    """

    source: onnx.ModelProto
    network: Network
    observation: Observation
    layers: tuple[MeasuredLayer, ...]
    activations: tuple[MeasuredActivation, ...]
    curves: Curves
    fallback: FloatFallback
    probed: Mapping[str, str]
    seen: Mapping[str, int]
    scratch: Scratch | None = None
    divergence: Float | None = None
    unanchored: OptionCurves | None = None

    def __repr__(self) -> str:
        activations = len(self.network.activations)
        return f"Measurement({len(self.layers)} layers, {self.channels} channels, {activations} activations)"

    @property
    def aimed(self) -> Network:
        """The network with the measured tensors as its outputs."""
        return aimed_at(self.network, self.observation.metric.outputs)

    @property
    def by_layer(self) -> bool:
        """Whether the layers were measured one at a time, as those of a large network are."""
        return any(isinstance(each.codes, SpooledCodes) for each in self.layers)

    @property
    def channels(self) -> int:
        """Number of weight channels, the first rows of `curves`; the rest are activations."""
        return sum(layer.linear.channels for layer in self.network.searched)

    def unit_rows(self) -> list[slice]:
        """Return the rows of `curves` of each layer's channels."""
        ends = np.cumsum([0, *(layer.linear.channels for layer in self.network.searched)])
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]

    def units(self) -> list[Unit]:
        """List all layers, then all activations."""
        layers, activations = self.network.searched, self.network.activations
        units = [
            Unit("layer", layer.name, self.network.names(layer), rows)
            for layer, rows in zip(layers, self.unit_rows(), strict=True)
        ]
        for row, each in enumerate(activations, self.channels):
            units.append(Unit("activation", each.tensor, each.names, slice(row, row + 1), each.fusion))
        return units

    def per_layer(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Split values of all weight channels into one array per layer."""
        return [rows[part] for part in self.unit_rows()]


def aimed_at(network: Network, outputs: Sequence[str]) -> Network:
    """Return `network` with the measured tensors `outputs` as its outputs."""
    return replace(network, model=with_outputs(network.model, outputs))


def activation_elements(activation: Activation, sizes: Mapping[str, int]) -> int:
    """Return the elements per sample that an activation spends bits on: those of the tensors that feed layers."""
    return sum(sizes[t] for t in activation.feeds) or sizes[activation.tensor]


def curves_of(
    network: Network,
    observation: Observation,
    weights: Sequence[tuple[MeasuredLayer, Float]],
    activations: Sequence[Mapping[int, float]],
) -> Curves:
    """Assemble curves from those of the layers, at the widths of their codes, and of the activations, by width.

    All channels have one scale; `with_blocks` tells what others take.
    """
    channels = sum(layer.linear.channels for layer in network.searched)
    distortion = np.full((channels + len(activations), MAX_BITS + 1), np.inf)
    first = 0
    for layer, curves in weights:
        distortion[first : first + len(curves), list(layer.codes)] = curves
        first += len(curves)
    elements = [np.full(x.linear.channels, x.linear.row_length) for x in network.searched]
    for row, curve in zip(distortion[channels:], activations, strict=True):
        row[list(curve)] = list(curve.values())
    sizes = [activation_elements(a, observation.sizes) for a in network.activations]
    return Curves(
        np.arange(MAX_BITS + 1), np.concatenate([*elements, np.array(sizes, np.int64)]).astype(np.int64), distortion
    )


def with_option_curves(layer: MeasuredLayer, curves: Sequence[Float]) -> MeasuredLayer:
    """Replace the curves of each of a layer's options."""
    options = zip(layer.options, curves, strict=True)
    return layer if not curves else replace(layer, options=tuple(replace(o, distortion=d) for o, d in options))


def option_curves(measurement: Measurement) -> OptionCurves:
    """Return the curves of a measurement, and those of each layer's options."""
    return measurement.curves.distortion, tuple(tuple(o.distortion for o in x.options) for x in measurement.layers)


def with_curves(measurement: Measurement, found: OptionCurves) -> Measurement:
    """Replace the curves of a measurement, and those of each layer's options."""
    distortion, options = found
    layers = tuple(map(with_option_curves, measurement.layers, options))
    return replace(measurement, layers=layers, curves=replace(measurement.curves, distortion=distortion))


SCALE_BITS = 16


def block_bits(layer: Layer, block: int) -> int:
    """Return the bits that the scales of a channel take. One scale is not counted."""
    return SCALE_BITS * (layer.linear.row_length // block) if block else 0


def with_blocks(measurement: Measurement, layers: Sequence[MeasuredLayer], distortion: Float) -> Measurement:
    """Replace the layers of a measurement, and their curves; the scales of their blocks take bits."""
    elements = measurement.curves.elements
    overhead = np.zeros(len(elements), np.int64)
    for each, rows in zip(layers, measurement.unit_rows(), strict=True):
        overhead[rows] = block_bits(each.layer, each.block)
    curves = Curves(measurement.curves.widths, elements, distortion, overhead if overhead.any() else None)
    return replace(measurement, layers=tuple(layers), curves=curves)
