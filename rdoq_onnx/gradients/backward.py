"""Reverse passes over F̃: g = Jᵀ v at all of its Adds at once, batch by batch (supplement, Eq. 3 to 5).

v is a vector over the outputs, independent for each sample: random signs, for which E_v[(vᵀ J Δ)²] = ‖J Δ‖², or, for
few outputs, each unit vector in turn, which is exact.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ValueInfoProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import ModelError, ShortageError
from rdoq_onnx.gradients.ends import ends_of
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.gradients.reverse import Reverse, reverse_model
from rdoq_onnx.gradients.sum_graph import SumGraph
from rdoq_onnx.model.layers import Layer, Use
from rdoq_onnx.system.runtime import BoundFeeds, Runtime, Session

Array = NDArray[Any]


@dataclass(frozen=True)
class Pass:
    """Results of one batch.

    rows: g by name, for each v; only the first row also holds the tensors of the forward pass, which do not depend on
    v. batch: samples that ran. count: the real ones among them, which come first; copies of the last fill the batch.
    """

    rows: tuple[dict[str, Array], ...]
    batch: int
    count: int


@dataclass(frozen=True)
class Backward:
    """The reverse graph of a plan for samples of one shape, and its session.

    reverse: `adjoints` names the output that holds g of each tensor; `missing` lists tensors without one. ends: what
    seeds belong to, by the index of the measured tensor (ends.py).
    session: None before loading, or if ONNX Runtime rejects the graph; then all adjoints are missing.
    """

    plan: ReversePlan
    reverse: Reverse
    ends: Mapping[int, str]
    session: Session | None = None

    @property
    def batch(self) -> int:
        """The number of samples of a run."""
        return self.plan.batch

    @classmethod
    def of(cls, plan: ReversePlan) -> "Backward":
        """Build the reverse graph of `plan`, without loading it."""
        _, feeds = next(full_batches(plan.samples, plan.batch))
        network = plan.network
        model, ends = ends_of(plan.differentiated, plan.metric)
        data = [u.data for layer in network.layers for u in layer.uses]
        tensors = list(dict.fromkeys([*data, *network.sites.values()]))
        reverse = reverse_graph(
            model, feeds, plan.runtime, at=perturbed(network), outputs=list(ends.values()), fetch=tensors
        )
        return cls(plan, reverse, ends)

    def loaded(self, runtime: Runtime, model: onnx.ModelProto | None = None) -> "Backward":
        """Return a copy with a session of `model`, a graph derived from the reverse graph, or of that graph itself.

        Raises ShortageError if memory does not suffice.
        """
        try:
            return replace(self, session=runtime.session(model or self.reverse.model, "all"))
        except ShortageError:
            raise
        except ModelError as error:  # an adjoint from onnx-ad that ONNX Runtime rejects
            tensors = (*self.reverse.adjoints, *self.reverse.missing)
            lost = dict.fromkeys(tensors, f"its adjoint does not load: {error}")
            return replace(self, reverse=replace(self.reverse, adjoints={}, missing=lost))

    def sum_graph(self) -> SumGraph:
        """Return a SumGraph that appends sums to the reverse graph."""
        return SumGraph(self.reverse.model, declared_shapes(self.reverse.model.graph.output), self.batch)

    def travelling(self) -> "Backward":
        """Return a copy that sums blocks of samples in any process, once it is `loaded` there."""
        return replace(self, plan=self.plan.travelling(), session=None)

    def passes(self, exact: bool = True, blocks: Sequence[Block] | None = None) -> Iterator[Pass]:
        """Yield one Pass per batch, none without a session; arguments as in `batches`."""
        session, fetched = self.session, set(self.reverse.adjoints.values())
        if session is None:
            return

        def fetch(row: int, feeds: dict[str, Array]) -> dict[str, Array]:
            names = [o for o in session.outputs if not row or o in fetched]
            return dict(zip(names, session.run(feeds, names), strict=True))

        for count, rows in self.batches(exact, blocks):
            yield Pass(tuple(fetch(k, feeds) for k, feeds in enumerate(rows)), self.batch, count)

    def sums(
        self, exact: bool = True, blocks: Sequence[Block] | None = None, fixed: BoundFeeds | None = None
    ) -> Iterator[tuple[int, Iterator[list[Array]]]]:
        """Yield (real samples, all outputs for each v) per batch, from a session that outputs sums over a batch.

        fixed: additional feeds. exact, blocks: as in `batches`. Yields nothing if there is nothing to sum.
        """
        session = self.session
        if session is None or not session.outputs:
            return
        for count, rows in self.batches(exact, blocks):
            yield count, ([v.numpy() for v in session.bound({**feeds, **(fixed or {})})] for feeds in rows)

    def batches(
        self, exact: bool = True, blocks: Sequence[Block] | None = None
    ) -> Iterator[tuple[int, Iterator[dict[str, Array]]]]:
        """Yield (real samples, feeds with the seeds of each v) per batch; the seeds of filler samples are 0.

        exact: v runs over the unit vectors if outputs are few. blocks: the runs; None for all of the plan.
        """
        for block in self.plan.blocks(exact) if blocks is None else blocks:
            done = block.first
            for count, feeds in full_batches(block.samples, self.batch):
                yield count, self._rows(feeds, done, count, self.plan.units(exact))
                done += count

    def lost(self, layer: Layer) -> bool:
        """Whether any output of `layer` lacks an adjoint."""
        return any(u.output in self.reverse.missing for u in layer.uses)

    def _rows(self, feeds: dict[str, Array], first: int, count: int, units: bool) -> Iterator[dict[str, Array]]:
        metric, reverse, batch = self.plan.metric, self.reverse, self.batch
        shapes = declared_shapes(reverse.model.graph.input)
        sizes = [int(np.prod(shapes[reverse.seeds[end]])) // batch for end in self.ends.values()]
        elements = sum(sizes)
        factors = [metric.factors[k] * metric.share(k, n) ** 0.5 for k, n in zip(self.ends, sizes, strict=True)]
        for row in range(elements if units and reverse.adjoints else 1):
            if units:
                v = np.zeros((batch, elements), np.float32)
                v[:, row] = 1
            else:
                v = np.stack([_signs(self.plan.seed, first + k, elements) for k in range(batch)])
            v[count:] = 0
            parts = np.split(v, np.cumsum(sizes)[:-1], axis=1)
            seeds = {
                reverse.seeds[end]: (part * np.float32(w)).reshape(shapes[reverse.seeds[end]])
                for end, part, w in zip(self.ends.values(), parts, factors, strict=True)
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
    """Build `reverse_model` for batches of the size of `feeds`; only the forward pass if `at` is empty."""
    return reverse_model(static(model, feeds), at, outputs, fetch, feeds=feeds, runtime=runtime)


def declared_shapes(values: Iterable[ValueInfoProto]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of inputs or outputs of a graph of fixed size, by name."""
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def static(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> onnx.ModelProto:
    """Return a copy of `model` whose inputs have the shapes of `feeds`."""
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
    """Return the tensors that carry an Add of F̃."""
    outputs = [u.output for layer in network.layers for u in layer.uses]
    return list(dict.fromkeys([*outputs, *network.sites.values()]))


def full_batches(samples: Samples, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yield (real samples, feeds of `size` samples) per batch; copies of the last sample fill the last batch."""
    for count, feeds in samples.counted_batches(size):
        missing = size - count
        yield (
            count,
            {
                k: np.concatenate([v, np.repeat(v[-1:], missing, 0)]) if missing and k not in samples.constants else v
                for k, v in feeds.items()
            },
        )


def _signs(seed: int, sample: int, count: int) -> NDArray[np.float32]:
    """Draw v of one sample from the sample's index, so that it does not depend on batching."""
    signs = np.random.default_rng([seed, sample]).integers(0, 2, count, np.int8)
    return (2 * signs - 1).astype(np.float32)


def weight_gradients(layer: Layer, mean: NDArray[np.float32], done: Pass, adjoints: Mapping[str, str]) -> Array:
    """Return g (X - E[x])ᵀ, [samples, G, rows·O, K]; mean [G, 1, K]."""
    gradient: Any = 0.0
    for use in layer.uses:
        x, g = use_gradients(use, done, adjoints)
        gradient = gradient + g @ x.swapaxes(-1, -2) - g.sum(axis=-1, keepdims=True) * mean
    return np.asarray(gradient)


def use_gradients(use: Use, done: Pass, adjoints: Mapping[str, str]) -> tuple[Array, Array]:
    """Return X [samples, G, K, P] of one use of a layer, and g [samples, G, rows·O, P] of all rows."""
    linear, count = use.linear, done.count
    x = linear.unfold(done.rows[0][use.data], done.batch)[:count]
    rows = [linear.outputs(row[adjoints[use.output]], done.batch)[:count] for row in done.rows]
    return x, np.stack(rows, axis=2).reshape(count, linear.group, -1, x.shape[-1])
