"""Exact curves (Eq. 7 and 8): feed a finite perturbation to its Add of F̃, run, compare outputs.

Only the part downstream of the Add runs (suffix.py), on tensors of one run at s = 0 (prefix.py). One batch holds many
(channel, width) pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.external import with_values
from rdoq_onnx.model.layers import Activation, Layer, Use
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.prefix import CACHE_BYTES, Prefix
from rdoq_onnx.probing.suffix import Suffix
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime, Session, Tensor

# Limits on the perturbed samples of one run: bytes at both ends of a suffix, and rows. On a CPU, the tensors between
# two layers then stay in the cache; a GPU needs larger batches.
_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_ROWS = {"cpu": 128, "cuda": 1024}

Array = NDArray[Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """A batch of samples. count: their number. tensors, outputs: of F."""

    count: int
    tensors: Mapping[str, Tensor]
    outputs: tuple[Array, ...]

    def unfolded(self, layer: Layer, mean: NDArray[np.float64] | float) -> Iterator[tuple[Use, Array]]:
        """Yield X of each use of `layer`, less the `mean` that its corrected bias accounts for."""
        for use in layer.uses:
            x = use.linear.unfold(self.tensors[use.data].numpy(), self.count)
            yield use, x - np.asarray(mean, np.float32)[..., None]


@dataclass(frozen=True)
class Prober:
    """Exact measurements on `samples`. memory: bytes of tensors of F that may be cached."""

    network: Network
    samples: Samples
    metric: Metric
    runtime: Runtime
    batching: Batching
    memory: int = CACHE_BYTES

    def layer(
        self, layer: Layer, codes: Sequence[WeightCodes], mean: NDArray[np.float64] | float = 0.0
    ) -> NDArray[np.float64]:
        """Return δ of each channel of `layer`, all else in float, for each of `codes`; [units, len(codes)].

        mean [G, K]: mean input, for the bias correction.
        """
        deltas = self._deltas(layer, codes)
        suffix = self._suffix("z", [u.output for u in layer.uses])
        total = np.zeros((layer.linear.channels, len(codes)))
        pairs = [(j, w) for j in range(layer.linear.channels) for w in range(len(codes))]
        for batch in self._batches(suffix, layer):
            blocks = {u: [d @ x for d in deltas] for u, x in batch.unfolded(layer, mean)}
            for chunk in self._chunks(pairs, suffix, batch):
                parameters = {
                    u.output: _channels_alone(layer, outputs, chunk, batch.tensors[u.output].shape)
                    for u, outputs in blocks.items()
                }
                for (j, w), error in zip(chunk, self._errors(suffix, batch, parameters, len(chunk)), strict=True):
                    total[j, w] += error
        return total / len(self.samples)

    def whole_layer(
        self, layer: Layer, codes: Sequence[WeightCodes], mean: NDArray[np.float64] | float = 0.0
    ) -> NDArray[np.float64]:
        """Return δ of all channels of `layer` at once, all else in float, for each of `codes`; [len(codes)]."""
        if layer.linear.axes:
            return np.array([self._replaced(layer, each) for each in codes])
        deltas = self._deltas(layer, codes)
        suffix = self._suffix("z", [u.output for u in layer.uses])
        total = np.zeros(len(codes))
        for batch in self._batches(suffix, layer):
            unfolded = dict(batch.unfolded(layer, mean))
            for chunk in self._chunks(range(len(codes)), suffix, batch):
                parameters = {
                    u.output: np.concatenate(
                        [layer.linear.refold(deltas[k] @ x, batch.tensors[u.output].shape) for k in chunk]
                    )
                    for u, x in unfolded.items()
                }
                total[list(chunk)] += self._errors(suffix, batch, parameters, len(chunk))
        return total / len(self.samples)

    def powers(
        self, layer: Layer, codes: Sequence[WeightCodes], mean: NDArray[np.float64] | float = 0.0
    ) -> NDArray[np.float64]:
        """Return E‖Δz‖² of each channel of `layer` for each of `codes`, [units, len(codes)]."""
        deltas, total = self._deltas(layer, codes), np.zeros((layer.linear.channels, len(codes)))
        for count, tensors in self._prefix.batches([u.data for u in layer.uses]):
            for _, x in Batch(count, tensors, ()).unfolded(layer, mean):
                squares = np.stack([np.square(d @ x, dtype=np.float64).sum(axis=(0, -1)) for d in deltas])
                total += layer.linear.ungrouped(squares[..., None]).sum(axis=-1).T
        return total / len(self.samples)

    def activation(self, activation: Activation, quantizers: Sequence[Affine]) -> NDArray[np.float64]:
        """Return δ of `activation` under each quantizer, all else in float; [len(quantizers)]."""
        suffix = self._suffix("a", [activation.tensor])
        total = np.zeros(len(quantizers))
        for batch in self._batches(suffix):
            a = batch.tensors[activation.tensor].numpy()
            for chunk in self._chunks(range(len(quantizers)), suffix, batch):
                perturbation = np.concatenate([quantizers[k](a) - a for k in chunk])
                parameters = {activation.tensor: perturbation}
                total[list(chunk)] += self._errors(suffix, batch, parameters, len(chunk))
        return total / len(self.samples)

    def _replaced(self, layer: Layer, codes: WeightCodes) -> float:
        """Return δ with the values of `codes` in place of a weight that no product unfolds."""
        value = layer.linear.tensor(codes.values)
        changed = self.runtime.session(with_values(self.network.model, layer.weight, value), "all")
        total = 0.0
        for count, feeds in self.samples.counted_batches(self.batching.size):
            one, other = (session.run(feeds, self.metric.outputs) for session in (changed, self._whole))
            total += float(self.metric.errors(one, other, count).sum())
        return total / len(self.samples)

    @cached_property
    def _whole(self) -> Session:
        return self.runtime.session(self.network.model, "all")

    @cached_property
    def _prefix(self) -> Prefix:
        return Prefix.of(self.network, self.metric.outputs, self.samples, self.batching, self.runtime, self.memory)

    def _suffix(self, kind: str, tensors: Sequence[str]) -> Suffix:
        return Suffix.of(self._prefix, kind, tensors, self.runtime)

    def _deltas(self, layer: Layer, codes: Sequence[WeightCodes]) -> list[Array]:
        """Return ΔW of each of `codes`, [G, O, K]."""
        rows = self.network.rows(layer)
        return [layer.linear.grouped(c.change(rows).astype(np.float32)) for c in codes]

    def _batches(self, suffix: Suffix, layer: Layer | None = None) -> Iterator[Batch]:
        """Yield batches of the tensors that `suffix` and `layer` consume."""
        data = [u.data for u in layer.uses] if layer else []
        names = list(dict.fromkeys([*suffix.edge, *suffix.parameters, *data, *self.metric.outputs]))
        for count, tensors in self._prefix.batches(names):
            yield Batch(count, tensors, tuple(tensors[o].numpy() for o in self.metric.outputs))

    def _chunks(self, items: Sequence[Item], suffix: Suffix, batch: Batch) -> Iterator[Sequence[Item]]:
        """Split `items` into chunks that run together."""
        device = self.runtime.device
        rows = min(_BYTES[device] // suffix.row, _ROWS[device])
        size = max(1, rows // batch.count) if self.batching.stackable else 1
        return (items[start : start + size] for start in range(0, len(items), size))

    def _errors(
        self, suffix: Suffix, batch: Batch, perturbations: Mapping[str, Array], repeats: int
    ) -> NDArray[np.float64]:
        """Sum ‖F̃ - F‖² / D over the samples, for each of `repeats` perturbations stacked along axis 0; [repeats]."""
        values = suffix.run(batch.tensors, perturbations, repeats)
        unstacked = [v.reshape(repeats, *o.shape) for v, o in zip(values, batch.outputs, strict=True)]
        errors = self.metric.errors(unstacked, batch.outputs, repeats * batch.count)
        return np.asarray(errors.reshape(repeats, batch.count).sum(axis=1))


def exact(
    candidates: Candidates, prober: Prober, advance: Advance, unfinished: Unfinished | None = None
) -> Distortions:
    """Measure the curves of all `candidates` exactly; `advance(1)` after each layer and activation.

    unfinished: curves measured by an earlier run, which are reused.
    """
    unfinished = unfinished or Unfinished()
    before = unfinished.get() or {"weights": (), "activations": ()}
    weights, activations = [*before["weights"]], [*before["activations"]]

    def finish_part() -> None:
        unfinished.put({"weights": tuple(weights), "activations": tuple(activations)})
        advance(1)

    if weights:
        advance(len(weights) + len(activations))
    for layer in candidates.layers[len(weights) :]:
        weights.append(exact_layer(prober, layer))
        finish_part()
    for activation in candidates.activations[len(activations) :]:
        activations.append(exact_activation(prober, activation))
        finish_part()
    return Distortions(tuple(weights), tuple(activations), {})


def exact_layer(prober: Prober, candidates: LayerCandidates) -> NDArray[np.float64]:
    """Measure δ of each channel for each rounding variant, [variants, units, widths]."""
    return np.stack([prober.layer(candidates.layer, codes, candidates.mean) for codes in candidates.variants])


def exact_activation(prober: Prober, candidates: ActivationCandidates) -> dict[int, NDArray[np.float64]]:
    """Measure δ of the activation under each quantizer, by width."""
    table = candidates.table
    flat = prober.activation(candidates.activation, candidates.flat)
    parts = np.split(flat, np.cumsum([len(quantizers) for quantizers in table.values()])[:-1])
    return dict(zip(table, parts, strict=True))


def _channels_alone(
    layer: Layer, blocks: Sequence[Array], pairs: Sequence[tuple[int, int]], shape: tuple[int, ...]
) -> Array:
    """Return Δz of each (unit, width) pair, zero except in the unit's channel, stacked along axis 0."""
    stacked = np.zeros((len(pairs), *blocks[0].shape), np.float32)
    for row, (unit, width) in zip(stacked, pairs, strict=True):
        where = (slice(None), *layer.linear.block(unit))
        row[where] = blocks[width][where]
    flat = stacked.reshape(-1, *blocks[0].shape[1:])
    return layer.linear.refold(flat, (len(pairs) * shape[0], *shape[1:]))
