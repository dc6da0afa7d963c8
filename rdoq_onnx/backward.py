"""Reverse passes over F̃: g = Jᵀ v at every Add of it at once, batch by batch (supplement, Eq. 3 to 5).

v is a vector over the outputs, independent for each sample: random signs, for which E_v[(vᵀ J Δ)²] = ‖J Δ‖², or the
unit vectors one after another where outputs are few, which is exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.adjoint import Reverse, reverse_model
from rdoq_onnx.analysis import Layer, Network
from rdoq_onnx.distortion import Metric
from rdoq_onnx.errors import ModelError
from rdoq_onnx.runtime import Runtime, Session
from rdoq_onnx.samples import Samples

EXACT_ROWS = 16
LEAST_DRAWS = 32  # of v: fewer samples are gone over again, or the best of many quantizers would be the luckiest

Array = NDArray[Any]


def rows_of(elements: int) -> int:
    """The number of v that are gone through for each sample of an output of `elements` elements."""
    return elements if elements <= EXACT_ROWS else 1


def rounds(samples: int) -> int:
    """How often random v are drawn for each of `samples` samples."""
    return -(-LEAST_DRAWS // samples)


def draws(samples: int, elements: int) -> int:
    """How many values of ⟨g, Δ⟩² a curve is the mean of."""
    rows = rows_of(elements)
    return samples * (rows if rows > 1 else rounds(samples))


@dataclass(frozen=True)
class Pass:
    """What one batch gives.

    rows: for each v, g by name; the tensors of the forward pass, which are the same for all, are in the first alone.
    batch: samples that ran; count: those of them that are real, the first ones; the batch is filled up with copies of
    the last.
    """

    rows: tuple[dict[str, Array], ...]
    batch: int
    count: int


@dataclass(frozen=True)
class Backward:
    """A network with its reverse graph, loaded.

    reverse: its `adjoints` name the output that holds g of each tensor, its `missing` the tensors that have none.
    session: None where ONNX Runtime does not take the reverse graph, and all adjoints are missing.
    """

    reverse: Reverse
    session: Session | None
    metric: Metric
    batch: int

    @classmethod
    def of(
        cls,
        network: Network,
        samples: Samples,
        metric: Metric,
        runtime: Runtime,
        batch: int,
        around: onnx.ModelProto | None = None,
    ) -> "Backward":
        """around: the model whose Jacobian is taken, with the tensors of `network.model`, which it is by default."""
        _, feeds = next(full_batches(samples, batch))
        data = [u.data for layer in network.layers for u in layer.uses]
        reverse = reverse_model(
            static(around or network.model, feeds),
            perturbed(network),
            metric.outputs,
            list(dict.fromkeys([*data, *(a.tensor for a in network.activations)])),
            feeds=feeds,
            optimize=runtime.optimized,
            run=lambda model, feeds, names: runtime.session(model).run(feeds, names),
        )
        try:
            return cls(reverse, runtime.session(reverse.model, "all"), metric, batch)
        except ModelError as error:  # a rule of onnx-ad that ONNX Runtime does not take
            lost = dict.fromkeys(perturbed(network), f"its adjoint does not load: {error}")
            return cls(replace(reverse, adjoints={}, missing=lost), None, metric, batch)

    def passes(self, samples: Samples, seed: int, exact: bool = True, first: int = 0) -> Iterator[Pass]:
        """One pass a batch; where `exact`, one for each unit vector v if outputs are few. `first` samples are done."""
        if self.session is None:
            return
        units = exact and self.metric.elements <= EXACT_ROWS
        for _ in range(first // len(samples), 1 if units else rounds(len(samples))):
            rest = samples.take(slice(first % len(samples), None))
            for count, feeds in full_batches(rest, self.batch):
                yield Pass(tuple(self._rows(self.session, feeds, seed, first, units)), self.batch, count)
                first += count

    def lost(self, layer: Layer) -> bool:
        """Whether an output of `layer` has no adjoint."""
        return any(u.output in self.reverse.missing for u in layer.uses)

    def _rows(
        self, session: Session, feeds: dict[str, Array], seed: int, first: int, units: bool
    ) -> Iterator[dict[str, Array]]:
        metric, reverse = self.metric, self.reverse
        shapes = {i.name: i.shape for i in session.handle.get_inputs()}
        sizes = [int(np.prod(shapes[reverse.seeds[o]])) // self.batch for o in metric.outputs]
        fetched = set(reverse.adjoints.values())
        for row in range(metric.elements if units and fetched else 1):
            if units:
                v = np.zeros((self.batch, metric.elements), np.float32)
                v[:, row] = 1
            else:
                v = np.stack([_signs(seed, first + k, metric.elements) for k in range(self.batch)])
            parts = np.split(v, np.cumsum(sizes)[:-1], axis=1)
            seeds = {
                reverse.seeds[o]: (part * np.float32(w)).reshape(shapes[reverse.seeds[o]])
                for o, part, w in zip(metric.outputs, parts, metric.weights, strict=True)
            }
            names = [o for o in session.outputs if not row or o in fetched]
            yield dict(zip(names, session.run({**feeds, **seeds}, names), strict=True))


def static(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy of `model` whose inputs have the shapes of `feeds`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        if value.name in feeds:
            del value.type.tensor_type.shape.dim[:]
            for size in feeds[value.name].shape:
                value.type.tensor_type.shape.dim.add().dim_value = size
    del copy.graph.value_info[:]
    return copy


def perturbed(network: Network) -> list[str]:
    """The tensors that carry an Add of F̃."""
    outputs = [u.output for layer in network.layers for u in layer.uses]
    return list(dict.fromkeys([*outputs, *(a.tensor for a in network.activations)]))


def full_batches(samples: Samples, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """(samples that count, feeds of `size` samples): the last batch is filled up with its last sample."""
    for count, feeds in samples.counted_batches(size):
        short = size - count
        yield count, {
            k: np.concatenate([v, np.repeat(v[-1:], short, 0)]) if short and k not in samples.constants else v
            for k, v in feeds.items()
        }


def _signs(seed: int, sample: int, count: int) -> NDArray[np.float32]:
    """v of one sample; it depends on the sample's number, not on how samples are batched."""
    signs = np.random.default_rng([seed, sample]).integers(0, 2, count, np.int8)
    return (2 * signs - 1).astype(np.float32)
