"""Reverse passes over F̃: g = Jᵀ v at every Add of it at once, batch by batch (supplement, Eq. 3 to 5).

v is a vector over the outputs, independent for each sample: random signs, for which E_v[(vᵀ J Δ)²] = ‖J Δ‖², or the
unit vectors one after another where outputs are few, which is exact.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ValueInfoProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import ModelError, ShortageError
from rdoq_onnx.gradients.plan import EXACT_ROWS, ReversePlan, rounds
from rdoq_onnx.gradients.reverse import Reverse, reverse_model
from rdoq_onnx.gradients.sum_graph import SumGraph
from rdoq_onnx.model.layers import Layer, Use
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.system.runtime import BoundFeeds, Runtime, Session

Array = NDArray[Any]


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
    session: None until it is loaded, and where ONNX Runtime does not take the graph; then all adjoints are missing.
    """

    reverse: Reverse
    session: Session | None
    metric: Metric
    batch: int

    @classmethod
    def of(cls, plan: ReversePlan) -> "Backward":
        """Not loaded yet."""
        _, feeds = next(full_batches(plan.samples, plan.batch))
        network, outputs = plan.network, plan.metric.outputs
        data = [u.data for layer in network.layers for u in layer.uses]
        tensors = list(dict.fromkeys([*data, *network.sites.values()]))
        reverse = reverse_graph(
            plan.differentiated, feeds, plan.runtime, at=perturbed(network), outputs=outputs, fetch=tensors
        )
        return cls(reverse, None, plan.metric, plan.batch)

    def loaded(self, runtime: Runtime, model: onnx.ModelProto | None = None) -> "Backward":
        """The same with a session of `model`, which was made of the reverse graph and is that graph by default.

        Raises ShortageError if there is no memory for it.
        """
        try:
            return replace(self, session=runtime.session(model or self.reverse.model, "all"))
        except ShortageError:
            raise
        except ModelError as error:  # a rule of onnx-ad that ONNX Runtime does not take
            tensors = (*self.reverse.adjoints, *self.reverse.missing)
            lost = dict.fromkeys(tensors, f"its adjoint does not load: {error}")
            return replace(self, reverse=replace(self.reverse, adjoints={}, missing=lost))

    def sum_graph(self) -> SumGraph:
        """The reverse graph, for sums to be appended to."""
        return SumGraph(self.reverse.model, declared_shapes(self.reverse.model.graph.output), self.batch)

    def passes(self, samples: Samples, seed: int, exact: bool = True, first: int = 0) -> Iterator[Pass]:
        """One pass a batch; `exact` and `first` as for `batches`. Nothing without a session."""
        session, fetched = self.session, set(self.reverse.adjoints.values())
        if session is None:
            return

        def fetch(row: int, feeds: dict[str, Array]) -> dict[str, Array]:
            names = [o for o in session.outputs if not row or o in fetched]
            return dict(zip(names, session.run(feeds, names), strict=True))

        for count, rows in self.batches(samples, seed, exact, first):
            yield Pass(tuple(fetch(k, feeds) for k, feeds in enumerate(rows)), self.batch, count)

    def sums(
        self, samples: Samples, seed: int, exact: bool = True, first: int = 0, fixed: BoundFeeds | None = None
    ) -> Iterator[tuple[int, Iterator[list[Array]]]]:
        """(samples that count, for each v all that the session gives), for a session that gives sums over a batch.

        fixed: what it is fed besides. exact, first: as for `batches`. Nothing where there is nothing to sum.
        """
        session = self.session
        if session is None or not session.outputs:
            return
        for count, rows in self.batches(samples, seed, exact, first):
            yield count, ([v.numpy() for v in session.bound({**feeds, **(fixed or {})})] for feeds in rows)

    def batches(
        self, samples: Samples, seed: int, exact: bool = True, first: int = 0
    ) -> Iterator[tuple[int, Iterator[dict[str, Array]]]]:
        """(samples that count, feeds with the seeds of each v) of each batch; those that do not count have seeds of 0.

        exact: v runs over the unit vectors if outputs are few. first: so many samples are done already.
        """
        units = exact and self.metric.elements <= EXACT_ROWS
        for _ in range(first // len(samples), 1 if units else rounds(len(samples))):
            rest = samples.take(slice(first % len(samples), None))
            for count, feeds in full_batches(rest, self.batch):
                yield count, self._rows(feeds, seed, first, count, units)
                first += count

    def lost(self, layer: Layer) -> bool:
        """Whether an output of `layer` has no adjoint."""
        return any(u.output in self.reverse.missing for u in layer.uses)

    def _rows(
        self, feeds: dict[str, Array], seed: int, first: int, count: int, units: bool
    ) -> Iterator[dict[str, Array]]:
        metric, reverse = self.metric, self.reverse
        shapes = declared_shapes(reverse.model.graph.input)
        sizes = [int(np.prod(shapes[reverse.seeds[o]])) // self.batch for o in metric.outputs]
        for row in range(metric.elements if units and reverse.adjoints else 1):
            if units:
                v = np.zeros((self.batch, metric.elements), np.float32)
                v[:, row] = 1
            else:
                v = np.stack([_signs(seed, first + k, metric.elements) for k in range(self.batch)])
            v[count:] = 0
            parts = np.split(v, np.cumsum(sizes)[:-1], axis=1)
            seeds = {
                reverse.seeds[o]: (part * np.float32(w)).reshape(shapes[reverse.seeds[o]])
                for o, part, w in zip(metric.outputs, parts, metric.weights, strict=True)
            }
            yield {**feeds, **seeds}


def reverse_graph(
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    runtime: Runtime,
    *,
    fetch: Sequence[str],
    at: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Reverse:
    """`reverse_model` for batches of the size of `feeds`; with the forward pass alone where `at` is empty."""
    return reverse_model(static(model, feeds), at, outputs, fetch, feeds=feeds, runtime=runtime)


def declared_shapes(values: Iterable[ValueInfoProto]) -> dict[str, tuple[int, ...]]:
    """The shapes of inputs or outputs of a graph of fixed size."""
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


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
    return list(dict.fromkeys([*outputs, *network.sites.values()]))


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
