"""Sensitivity of the network's output to the rows of a table that is looked up.

A row r that a sample looks up at the positions p ∈ P_r adds its rounding error ΔW_r at each. To first order

    δ_r = E⟨∇_r, ΔW_r⟩² / D,    ∇_r = Σ_{p ∈ P_r} g_p

Few samples show few rows, most of them once or twice. So all rows share the second moment of their gradients, and a row
has a gain of its own, the expected squared gradient in a new sample:

    δ_r ≈ s_r ΔW_rᵀ F ΔW_r / D,    F = E[∇ ∇ᵀ] / E‖∇‖²,    s_r = π_r E‖∇_r‖²

π_r is the probability that a sample looks the row up. With N occurrences of T different rows, those never seen share
T / (N + T) of all occurrences (Witten and Bell, IEEE Trans. IT 1991, method C). Where samples that look up a row look
up all rows before it, as those of positions, longer ones will look up further rows: these count as the last one seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.candidates.blocks import in_parts
from rdoq_onnx.gradients.backward import Backward, Pass
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.system.progress import Advance

Float = NDArray[np.float64]

_PSEUDO = 4.0  # occurrences that the mean squared gradient of all rows counts for in that of a row


@dataclass(frozen=True)
class TableRows:
    """Sums over the rows of a table and over samples.

    seconds: Σ ∇ ∇ᵀ [2, parts, B, B] (see `in_parts`), of every other sample, so that rounding and curves need not share
    one. gains: s_r / D [rows]. seen: number of rows that a sample looks up.
    """

    seconds: Float
    gains: Float
    seen: int

    @property
    def rounding(self) -> Float:
        """The second moment that rounding errors are compensated under, [parts, B, B]."""
        return np.asarray(self.seconds[0])

    def spectrum(self) -> tuple[Float, Float]:
        """Return the eigenvectors [parts, B, B], in columns, and eigenvalues [parts, 1, B] of F."""
        values, vectors = np.linalg.eigh(self.seconds[1])
        values = np.maximum(values, 0)
        return vectors, (values / max(values.sum(), np.finfo(np.float64).tiny))[:, None]


def table_rows(
    plan: ReversePlan, tables: Sequence[Layer], advance: Advance
) -> tuple[dict[str, TableRows], dict[str, str]]:
    """Measure the rows of `tables`, by name, in one reverse pass; `advance(n)` after n more samples.

    Samples of rare shapes, which do not run backwards, count in how often rows occur. Also returns the tables whose
    output lacks an adjoint, by name, with the reason.
    """
    plan = replace(plan, network=replace(plan.network, layers=tuple(tables), activations=()))
    works = [_Work(Backward.of(part).travelling(), tuple(tables)) for part in plan.by_shape()]
    sums, missing = plan.summed(works, advance, exact=False)
    lost = {t.name: missing[u.output] for t in tables for u in t.uses if u.output in missing}
    elements, samples = plan.metric.elements, len(plan.samples)
    found = {t.name: _Sums(*sums[t.name]) for t in tables if t.name not in lost}
    occurrences = {t.name: _occurrences(plan, t) for t in tables if t.name in found}
    return {name: each.result(occurrences[name], elements, samples) for name, each in found.items()}, lost


@dataclass(frozen=True)
class _Work:
    """Sums of the rows of each table, by name, and tensors without an adjoint."""

    backward: Backward
    tables: tuple[Layer, ...]

    def loaded(self) -> Callable[[Block], tuple[dict[str, Any], dict[str, str]]]:
        backward = self.backward.loaded(self.backward.plan.runtime)
        usable = [t for t in self.tables if not backward.lost(t)]

        def run(block: Block) -> tuple[dict[str, Any], dict[str, str]]:
            sums = {table.name: _Sums.of(table) for table in self.tables}
            first = block.first
            for done in backward.passes(False, [block]) if usable else ():
                for table in usable:
                    sums[table.name].add(table, done, backward.reverse.adjoints, first)
                first += done.count
                del done  # or two passes would be in memory while the next one runs
            return {name: each.sums() for name, each in sums.items()}, dict(backward.reverse.missing)

        return run


def _occurrences(plan: ReversePlan, table: Layer) -> NDArray[np.int64]:
    """Return the number of samples that look up each row of `table`."""
    names = list(dict.fromkeys(use.data for use in table.uses))
    session = plan.runtime.session(with_outputs(plan.network.model, names), "all")
    occurrences = np.zeros(table.linear.channels, np.int64)
    for count, feeds in plan.samples.counted_batches(plan.batch):
        values = session.run(feeds, names)
        for rows in zip(*(_by_sample(v, count) for v in values), strict=True):
            occurrences[np.unique(np.concatenate(rows) % len(occurrences))] += 1
    return occurrences


def _by_sample(indices: NDArray[Any], count: int) -> NDArray[Any]:
    """Return the indices of each of `count` samples, [count, P]; all of them may share theirs."""
    own = indices.ndim > 0 and indices.shape[0] % count == 0
    each = indices.reshape(count if own else 1, -1)
    return np.broadcast_to(each, (count, each.shape[1]))


@dataclass
class _Sums:
    """Running sums of one table: of every other sample Σ ∇ ∇ᵀ, and of each row Σ ‖∇_r‖² and the number of samples."""

    seconds: Float
    power: Float
    count: NDArray[np.int64]

    @classmethod
    def of(cls, table: Layer) -> "_Sums":
        rows, width = table.linear.channels, table.linear.inputs
        parts, inputs, _ = in_parts(np.empty((1, width, 1))).shape
        return cls(np.zeros((2, parts, inputs, inputs)), np.zeros(rows), np.zeros(rows, np.int64))

    def sums(self) -> tuple[Any, ...]:
        return self.seconds, self.power, self.count

    def add(self, table: Layer, done: Pass, adjoints: Mapping[str, str], first: int) -> None:
        """Add the samples of a batch, which come after `first` others."""
        uses = [_per_sample(table, u.data, adjoints[u.output], done) for u in table.uses]
        for k, parts in enumerate(zip(*uses, strict=True)):
            indices, gradients = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
            rows, place = np.unique(indices % len(self.power), return_inverse=True)
            summed = np.zeros((len(rows), gradients.shape[1]))
            np.add.at(summed, place.reshape(-1), gradients)
            blocks = in_parts(summed.T[None])
            self.seconds[(first + k) % 2] += blocks @ blocks.swapaxes(1, 2)
            self.power[rows] += np.square(summed).sum(axis=1)
            self.count[rows] += 1

    def result(self, occurrences: NDArray[np.int64], elements: int, samples: int) -> TableRows:
        """Return what the sums tell of rows, for `elements` output elements.

        occurrences: of `samples` samples, those that look up each row.
        """
        total, seen = int(occurrences.sum()), int((occurrences > 0).sum())
        unseen = len(occurrences) - seen
        left = seen / max(total + seen, 1) if unseen else 0.0
        kept, rest = 1 - left, left * total / max(unseen, 1)
        if (np.diff(occurrences) <= 0).all() and seen:
            kept, rest = 1.0, float(occurrences[seen - 1])
        expected = np.where(occurrences > 0, kept * occurrences, rest) / samples
        mean = self.power.sum() / max(self.count.sum(), 1)
        squared = (self.power + _PSEUDO * mean) / (self.count + _PSEUDO)
        return TableRows(self.seconds, expected * squared / elements, seen)


def _per_sample(table: Layer, data: str, adjoint: str, done: Pass) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return indices [P] and gradients [P, K] of each sample.

    Samples that share their indices share a gradient, the sum of theirs: v is independent for each, so that a part of
    it in proportion has the mean square of one.
    """
    gradients = done.rows[0][adjoint]
    indices, width = _by_sample(done.rows[0][data], done.batch), table.linear.inputs
    each = gradients.reshape(-1, indices.shape[1], width)
    if len(each) < done.batch:
        each = np.broadcast_to(each / done.count**0.5, (done.batch, *each.shape[1:]))
    return list(zip(indices, each, strict=True))[: done.count]
