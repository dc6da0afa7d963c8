"""Sums over samples that channel scales are chosen by: ranges, second moments and sensitivities of channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.channel_labels import Labels, of_rank
from rdoq_onnx.candidates.scale_groups import ScaleGroup
from rdoq_onnx.gradients.backward import Backward, Pass
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.model.layers import Layer

Float = NDArray[np.float64]
Array = NDArray[Any]


@dataclass
class ChannelSums:
    """Per channel of a tensor: extremes, sums over elements and samples of x² and g², and the number of elements."""

    low: Float
    high: Float
    squares: Float
    sensitivity: Float
    elements: Float

    @classmethod
    def of(cls, channels: int) -> "ChannelSums":
        return cls(*(np.zeros(channels) for _ in range(5)))

    def add(self, values: Array, gradient: Array, labels: Labels) -> None:
        if not values.size:
            return
        self.low = np.minimum(self.low, _reduced(np.minimum, values, labels, len(self.low)))
        self.high = np.maximum(self.high, _reduced(np.maximum, values, labels, len(self.high)))
        for total, added in (
            (self.squares, np.square(values, dtype=np.float64)),
            (self.sensitivity, np.square(gradient, dtype=np.float64)),
            (self.elements, np.ones(values.shape)),
        ):
            total += _reduced(np.add, added, labels, len(total))

    @property
    def power(self) -> Float:
        """E[x²]."""
        return self.squares / np.maximum(self.elements, 1)


def _reduced(combine: np.ufunc, values: Array, labels: Labels, channels: int) -> Float:
    """Reduce `values` over all elements of each channel, [channels]; those of no channel are left out."""
    full = of_rank(labels, values.ndim)
    axes = tuple(k for k, n in enumerate(full.shape) if n == 1)
    each = combine.reduce(values.astype(np.float64), axis=axes, keepdims=True)
    full = np.broadcast_to(full, each.shape)
    result, real = np.zeros(channels), full >= 0
    combine.at(result, full[real], each[real])
    return result


@dataclass(frozen=True)
class Measures:
    """Sums over samples: of each quantized tensor of the groups, and of g² of each output channel of their layers.

    runs: the number of samples, each as often as it ran.
    """

    tensors: Mapping[str, ChannelSums]
    layers: Mapping[str, Float]
    runs: int


def measure(groups: Sequence[ScaleGroup], plan: ReversePlan) -> Measures:
    """Collect the sums of all `groups` in reverse passes."""
    tensors = {p.name: (p.labels, ChannelSums.of(g.channels)) for g in groups for p in g.tensors}
    layers = {layer.name: layer for g in groups for layer, _ in g.layers}
    rows: dict[str, Float] = {}
    lost: set[str] = set()
    runs = 0
    for part in plan.by_shape():
        backward = Backward.of(part).loaded(part.runtime)
        adjoints, sites = backward.reverse.adjoints, part.network.sites
        lost |= {t for t in tensors if sites[t] not in adjoints}
        lost |= {n for n, x in layers.items() if any(u.output not in adjoints for u in x.uses)}
        for done in backward.passes(exact=False):
            runs += done.count
            for name, (labels, sums) in tensors.items():
                if name in lost:
                    continue
                site = sites[name]
                sums.add(_real(done.rows[0][site], done), _real(done.rows[0][adjoints[site]], done), labels)
            for name in (n for n in layers if n not in lost):
                rows[name] = rows.get(name, 0.0) + _squares(layers[name], done.rows[0], adjoints, done.batch)
    usable = {n for n, (_, s) in tensors.items() if n not in lost and np.isfinite([s.squares, s.sensitivity]).all()}
    return Measures({n: sums for n, (_, sums) in tensors.items() if n in usable}, rows, runs)


def _real(value: Array, done: Pass) -> Array:
    """Return the part of a tensor that belongs to real samples; all of it if axis 0 does not run over the samples."""
    rows, rest = divmod(len(value), done.batch)
    return value if rest else value[: rows * done.count]


def _squares(layer: Layer, values: Mapping[str, Array], adjoints: Mapping[str, str], batch: int) -> Float:
    """Return Σ g² over samples and positions of each output channel, [units]."""
    total: Any = 0.0
    for use in layer.uses:
        g = use.linear.outputs(values[adjoints[use.output]], batch)
        each = np.square(g, dtype=np.float64).sum(axis=(0, 3))[..., None]
        total = total + use.linear.ungrouped(each).sum(axis=-1)
    return np.asarray(total)
