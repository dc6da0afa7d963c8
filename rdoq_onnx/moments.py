"""First and second moments of every layer's input over samples: what error-compensated rounding needs.

Sums run over samples and positions, batch by batch; memory is set by the layers, not by the number of samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis import Layer, Network
from rdoq_onnx.observation import Batching, with_outputs
from rdoq_onnx.parallel import Workers
from rdoq_onnx.progress import Advance
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples

MOST_INPUTS = 2048  # inputs that share one covariance; wider layers have one for each part of theirs
_MEMORY = 1 << 30  # bytes of sums that one pass over the samples may hold

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """mean [G, K] of the unfolded input, and covariance [G·parts, B, B] of its parts (see `in_parts`)."""

    mean: Float
    covariance: Float


def collect(
    network: Network, samples: Samples, batching: Batching, runtime: Runtime, workers: Workers, advance: Advance
) -> tuple[Moments, ...]:
    """The moments of all layers; several passes over the samples where they would not fit together."""
    result: list[Moments] = []
    for layers in _portions(network.layers):
        tensors = list(dict.fromkeys(u.data for x in layers for u in x.uses))
        session = runtime.session(with_outputs(network.model, tensors), "all")
        sums = [_Sums(layer) for layer in layers]
        for count, feeds in samples.counted_batches(batching.size):
            values = dict(zip(session.outputs, session.run(feeds), strict=True))
            workers.map(partial(_Sums.add, values=values, samples=count), sums)
            advance(count)
        result += [s.result() for s in sums]
    return tuple(result)


def passes(network: Network) -> int:
    """How often `collect` goes over the samples."""
    return sum(1 for _ in _portions(network.layers))


def in_parts(values: NDArray[Any]) -> NDArray[Any]:
    """[G, K, P] -> [G·parts, B, P]: at most MOST_INPUTS inputs a part, the last part filled up with zeros."""
    groups, inputs, positions = values.shape
    if inputs <= MOST_INPUTS:
        return values
    parts = -(-inputs // MOST_INPUTS)
    width = -(-inputs // parts)
    padded = np.pad(values, ((0, 0), (0, parts * width - inputs), (0, 0)))
    return padded.reshape(groups * parts, width, positions)


def _inputs(layer: Layer) -> tuple[int, int]:
    """(groups, weights of a channel within one)."""
    rows = int(np.prod(layer.linear.shape)) // layer.linear.channels
    return layer.linear.group, rows // layer.linear.group if layer.linear.op_type == "ConvTranspose" else rows


def _portions(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    portion: list[Layer] = []
    held = 0
    for layer in layers:
        groups, inputs = _inputs(layer)
        size = 8 * groups * inputs * min(inputs, MOST_INPUTS)
        if portion and held + size > _MEMORY:
            yield portion
            portion, held = [], 0
        portion.append(layer)
        held += size
    yield portion


class _Sums:
    """Running sums for one layer."""

    def __init__(self, layer: Layer) -> None:
        groups, inputs = _inputs(layer)
        self.layer, self.count = layer, 0
        self.first = np.zeros((groups, inputs))
        width = in_parts(self.first[..., None]).shape[1]
        self.second = np.zeros((groups * -(-inputs // width), width, width))

    def add(self, values: Mapping[str, NDArray[np.float32]], samples: int) -> None:
        for use in self.layer.uses:
            unfolded = self.layer.linear.unfold(values[use.data], samples)
            flat = np.moveaxis(unfolded, 0, 2).reshape(*self.first.shape, -1)
            self.count += flat.shape[-1]
            self.first += flat.sum(axis=2, dtype=np.float64)
            parts = in_parts(flat)
            self.second += parts @ parts.swapaxes(1, 2)

    def result(self) -> Moments:
        mean = self.first / self.count
        parts = in_parts(mean[..., None])
        covariance = self.second / self.count - parts * parts.swapaxes(1, 2)
        # Rounding of the float32 products can leave a variance just under zero.
        index = np.arange(covariance.shape[-1])
        covariance[:, index, index] = np.maximum(covariance[:, index, index], 0.0)
        return Moments(mean, covariance)
