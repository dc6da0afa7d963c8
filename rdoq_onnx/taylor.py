"""First-order curves (supplement, Eq. 3 to 6): δ = E‖J Δ‖² / D with J = ∂F̃/∂s at s = 0.

For a random sign vector v over the outputs, independent for each sample, E_v[(vᵀ J Δ)²] = ‖J Δ‖². One reverse pass
gives g = Jᵀ v at every Add of F̃ at once; each channel, activation and width then costs one inner product ⟨g, Δ⟩. For
few outputs v runs over the unit vectors instead, and the estimate is exact to first order.

For a weight channel ⟨g, op(x, ΔW)⟩ = ⟨g Xᵀ, ΔW⟩ (see linear.py): the product g Xᵀ is made once for all widths. The bias
is corrected by -ΔW·E[x], so what is left of the perturbation is ΔW(x - E[x]) and the product is g (X - E[x])ᵀ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis import Layer, Network, Use
from rdoq_onnx.backward import Backward, Pass
from rdoq_onnx.candidates import Candidates
from rdoq_onnx.distortion import Metric
from rdoq_onnx.parallel import Workers
from rdoq_onnx.progress import Advance, Unfinished
from rdoq_onnx.quantizer import Affine, WeightCodes
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples

_CHUNK = 1 << 18  # elements of an activation that are sorted into bins at a time
_BINS = (12, 16)  # log2 of the number of bins, at least and at most: a range may hold 650 steps of an 8-bit quantizer
_BINNED = 10  # quantizers that take as long as one histogram
_CACHED = 1 << 15  # elements of an activation that are quantized at a time: they stay in the cache

Array = NDArray[Any]


@dataclass(frozen=True)
class Distortions:
    """Measured curves.

    weights: for each layer, δ of each variant of rounding, [variants, units, widths]. activations: for each activation
    and width, δ of each quantizer.
    missing: tensors whose curve could not be measured, with the reason; their entries are NaN.
    """

    weights: tuple[NDArray[np.float64], ...]
    activations: tuple[Mapping[int, NDArray[np.float64]], ...]
    missing: Mapping[str, str]


def first_order(
    network: Network,
    candidates: Candidates,
    samples: Samples,
    metric: Metric,
    runtime: Runtime,
    *,
    batch: int,
    seed: int,
    workers: Workers,
    advance: Advance,
    around: onnx.ModelProto | None = None,
    unfinished: Unfinished | None = None,
) -> Distortions:
    """Measure all curves of `network` over `samples`, `batch` of them at a time; `advance(n)` is told of n done.

    around: the model whose Jacobian is taken, with the tensors of `network.model`, which it is by default. unfinished:
        sums of an earlier run, which goes on from there.
    """
    backward = Backward.of(network, samples, metric, runtime, batch, around)
    sums, unfinished = _Sums(network, candidates, backward), unfinished or Unfinished()
    sums.restore(unfinished.get())
    if sums.samples:
        advance(sums.samples)
    for done in backward.passes(samples, seed, first=sums.samples):
        sums.add(done, workers)
        unfinished.put(sums.state())
        advance(done.count)
        del done  # or two passes would be in memory while the next one runs
    return sums.result(metric.elements)


def weight_gradients(layer: Layer, mean: NDArray[np.float32], done: Pass, adjoints: Mapping[str, str]) -> Array:
    """g (X - E[x])ᵀ, [samples, G, rows·O, K]; mean [G, 1, K]."""
    gradient: Any = 0.0
    for use in layer.uses:
        x, g = use_gradients(use, done, adjoints)
        gradient = gradient + g @ x.swapaxes(-1, -2) - g.sum(axis=-1, keepdims=True) * mean
    return np.asarray(gradient)


def use_gradients(use: Use, done: Pass, adjoints: Mapping[str, str]) -> tuple[Array, Array]:
    """X [samples, G, K, P] of one use of a layer, and g [samples, G, rows·O, P] of all rows."""
    linear, count = use.linear, done.count
    x = linear.unfold(done.rows[0][use.data], done.batch)[:count]
    rows = [linear.outputs(row[adjoints[use.output]], done.batch)[:count] for row in done.rows]
    return x, np.stack(rows, axis=2).reshape(count, linear.group, -1, x.shape[-1])


class _Sums:
    """Running sums of ⟨g, Δ⟩² over samples."""

    def __init__(self, network: Network, candidates: Candidates, backward: Backward) -> None:
        self._network, self._candidates, self._reverse = network, candidates, backward.reverse
        self.samples = 0
        self._layers = [
            _LayerSums(layer, network.rows(layer), codes, mean)
            for layer, codes, mean in zip(network.layers, candidates.weights, candidates.means, strict=True)
            if not backward.lost(layer)
        ]
        self._activations = [{b: np.zeros(len(q)) for b, q in table.items()} for table in candidates.activations]

    def add(self, done: Pass, workers: Workers) -> None:
        """Add the samples of one batch."""
        workers.map(lambda sums: sums.add(done, self._reverse.adjoints), self._layers)
        workers.map(
            lambda k: self._add_activation(k, done),
            [k for k, a in enumerate(self._network.activations) if a.tensor not in self._reverse.missing],
        )
        self.samples += done.count

    def state(self) -> dict[str, Any]:
        """The sums so far, for `restore`."""
        activations = tuple({b: v.copy() for b, v in table.items()} for table in self._activations)
        layers = tuple(s.total.copy() for s in self._layers)
        return {"samples": self.samples, "layers": layers, "activations": activations}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.samples, self._activations = state["samples"], [dict(table) for table in state["activations"]]
            for sums, total in zip(self._layers, state["layers"], strict=True):
                sums.total = total

    def _add_activation(self, index: int, done: Pass) -> None:
        tensor, quantizers = self._network.activations[index].tensor, self._candidates.activations[index]
        values = done.rows[0][tensor].reshape(done.batch, -1)[: done.count]
        name = self._reverse.adjoints[tensor]
        g = np.stack([row[name].reshape(done.batch, -1)[: done.count] for row in done.rows], axis=1)
        flat = [q for several in quantizers.values() for q in several]
        parts = np.split(_activation_sums(values, g, flat), np.cumsum([len(s) for s in quantizers.values()])[:-1])
        for bits, part in zip(quantizers, parts, strict=True):
            self._activations[index][bits] += part

    def result(self, elements: int) -> Distortions:
        share = 1.0 / (max(self.samples, 1) * elements)
        measured = {id(sums.layer): sums.total * share for sums in self._layers}
        weights = tuple(
            measured.get(id(layer), np.full((len(codes), layer.linear.channels, len(codes[0])), np.nan))
            for layer, codes in zip(self._network.layers, self._candidates.weights, strict=True)
        )
        activations = tuple(
            {b: v * (np.nan if a.tensor in self._reverse.missing else share) for b, v in sums.items()}
            for a, sums in zip(self._network.activations, self._activations, strict=True)
        )
        return Distortions(weights, activations, self._reverse.missing)


class _LayerSums:
    """Sums over samples and rows of ⟨g, Δz⟩² for one layer, [variants, units, widths]."""

    def __init__(
        self, layer: Layer, rows: NDArray[np.float32], codes: Sequence[Sequence[WeightCodes]], mean: NDArray[np.float64]
    ) -> None:
        self.layer, self._mean = layer, mean.astype(np.float32)[:, None, :]
        deltas = [code.values - rows for variant in codes for code in variant]
        self._deltas = np.ascontiguousarray(np.stack(deltas, axis=-1).astype(np.float32))
        self._shape = len(codes), layer.linear.channels, len(codes[0])
        self.total = np.zeros(self._shape)

    def add(self, done: Pass, adjoints: Mapping[str, str]) -> None:
        linear = self.layer.linear
        gradient = weight_gradients(self.layer, self._mean, done, adjoints)
        blocks = gradient.reshape(done.count, linear.group, len(done.rows), -1, gradient.shape[-1])
        per_unit = linear.ungrouped(np.moveaxis(blocks, 2, 1)).reshape(-1, linear.channels, self._deltas.shape[1])
        products = per_unit.swapaxes(0, 1) @ self._deltas
        sums = np.square(products, dtype=np.float64).sum(axis=1)
        self.total += np.moveaxis(sums.reshape(self._shape[1], self._shape[0], self._shape[2]), 1, 0)


@dataclass(frozen=True)
class _Staircases:
    """Quantizers as staircases: Q(a) = s (h - how many of its thresholds are above a), h the highest integer.

    thresholds: of all quantizers, one after another; each quantizer's begin at `starts`. scales, tops: its s and h.
    """

    thresholds: NDArray[np.float64]
    starts: NDArray[np.int64]
    scales: NDArray[np.float64]
    tops: NDArray[np.float64]

    @classmethod
    def of(cls, quantizers: Sequence[Affine]) -> "_Staircases":
        steps = [(np.arange(q.low, q.high) - q.zero_point + 0.5) * q.scale for q in quantizers]
        starts = np.cumsum([0, *(len(s) for s in steps[:-1])])
        scales, tops = zip(*((q.scale, q.high - q.zero_point) for q in quantizers), strict=True)
        return cls(np.concatenate(steps), starts, np.array(scales), np.array(tops, np.float64))

    def products(self, a: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """⟨g, Q(a) - a⟩ for each g of `rows` [R, E] and each quantizer, [R, quantizers].

        From one histogram of a with weights g, whatever the number of quantizers. Its bins are so narrow that a
        threshold within one may as well stand at its edge: the few values between are half a step off either way.
        """
        bins = 1 << int(np.clip(np.ceil(np.log2(4 * a.size)), *_BINS))
        least = a.min()
        pitch = np.float32((bins - 1) / max(float(a.max() - least), 1e-30))
        below = np.zeros((len(rows), bins + 1))
        for start in range(0, a.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            index = ((a[part] - least) * pitch).astype(np.intp)
            for total, g in zip(below, rows[:, part], strict=True):
                total[1:] += np.bincount(index, g, bins)
        np.cumsum(below, axis=1, out=below)
        edges = np.clip(np.rint((self.thresholds - least) * float(pitch)), 0, bins).astype(np.intp)
        missed = np.add.reduceat(below[:, edges], self.starts, axis=1)
        product: NDArray[np.float64] = self.scales * (self.tops * below[:, -1:] - missed) - (rows @ a)[:, None]
        return product


def _activation_sums(
    values: NDArray[np.float32], g: NDArray[np.float32], quantizers: Sequence[Affine]
) -> NDArray[np.float64]:
    """Sum over samples and rows of ⟨g, Q(a) - a⟩² for each quantizer; values [n, E], g [n, rows, E]."""
    products = _Staircases.of(quantizers).products
    if g.shape[1] * _BINNED > len(quantizers):
        products = partial(_products, quantizers)
    sums = np.zeros(len(quantizers))
    for a, rows in zip(values, g, strict=True):
        sums += np.square(products(a, rows)).sum(axis=0)
    return sums


def _products(
    quantizers: Sequence[Affine], a: NDArray[np.float32], rows: NDArray[np.float32]
) -> NDArray[np.float64]:
    """⟨g, Q(a) - a⟩ for each g of `rows` [R, E] and each quantizer, [R, quantizers]."""
    products = np.zeros((len(rows), len(quantizers)))
    for start in range(0, a.size, _CACHED):
        part, seeds = a[start : start + _CACHED], rows[:, start : start + _CACHED]
        for k, quantizer in enumerate(quantizers):
            products[:, k] += seeds @ (quantizer(part) - part)
    return products
