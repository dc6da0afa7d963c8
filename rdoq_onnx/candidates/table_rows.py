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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    sums = {table.name: _Sums(table, _occurrences(plan, table)) for table in tables}
    lost: dict[str, str] = {}
    runs = 0
    for part in plan.by_shape():
        backward = Backward.of(part).loaded(plan.runtime)
        missing = backward.reverse.missing
        lost |= {t.name: missing[u.output] for t in tables for u in t.uses if u.output in missing}
        usable = [sums[t.name] for t in tables if t.name not in lost]
        for done in backward.passes(exact=False) if usable else ():
            for each in usable:
                each.add(done, backward.reverse.adjoints, runs)
            runs += done.count
            advance(done.count)
            del done  # or two passes would be in memory while the next one runs
    elements, samples = plan.metric.elements, len(plan.samples)
    return {name: each.result(elements, samples) for name, each in sums.items() if name not in lost}, lost


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


class _Sums:
    """Running sums of one table. occurrences: the number of samples that look up each row."""

    def __init__(self, table: Layer, occurrences: NDArray[np.int64]) -> None:
        rows, width = table.linear.channels, table.linear.inputs
        self._table, self._occurrences = table, occurrences
        parts, inputs, _ = in_parts(np.empty((1, width, 1))).shape
        self._seconds = np.zeros((2, parts, inputs, inputs))
        self._power = np.zeros(rows)
        self._count = np.zeros(rows, np.int64)

    def add(self, done: Pass, adjoints: Mapping[str, str], first: int) -> None:
        """Add the samples of a batch, which come after `first` others."""
        uses = [self._per_sample(u.data, adjoints[u.output], done) for u in self._table.uses]
        for k, parts in enumerate(zip(*uses, strict=True)):
            indices, gradients = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
            rows, place = np.unique(indices % len(self._power), return_inverse=True)
            summed = np.zeros((len(rows), gradients.shape[1]))
            np.add.at(summed, place.reshape(-1), gradients)
            blocks = in_parts(summed.T[None])
            self._seconds[(first + k) % 2] += blocks @ blocks.swapaxes(1, 2)
            self._power[rows] += np.square(summed).sum(axis=1)
            self._count[rows] += 1

    def result(self, elements: int, samples: int) -> TableRows:
        """Return the sums, for `elements` output elements and `samples` samples that `occurrences` counts."""
        occurrences = self._occurrences
        total, seen = int(occurrences.sum()), int((occurrences > 0).sum())
        unseen = len(occurrences) - seen
        left = seen / max(total + seen, 1) if unseen else 0.0
        kept, rest = 1 - left, left * total / max(unseen, 1)
        if (np.diff(occurrences) <= 0).all() and seen:
            kept, rest = 1.0, float(occurrences[seen - 1])
        expected = np.where(occurrences > 0, kept * occurrences, rest) / samples
        mean = self._power.sum() / max(self._count.sum(), 1)
        squared = (self._power + _PSEUDO * mean) / (self._count + _PSEUDO)
        return TableRows(self._seconds, expected * squared / elements, seen)

    def _per_sample(self, data: str, adjoint: str, done: Pass) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Return indices [P] and gradients [P, K] of each sample.

        Samples that share their indices share a gradient, the sum of theirs: v is independent for each, so that a part
        of it in proportion has the mean square of one.
        """
        gradients = done.rows[0][adjoint]
        indices, width = _by_sample(done.rows[0][data], done.batch), self._table.linear.inputs
        each = gradients.reshape(-1, indices.shape[1], width)
        if len(each) < done.batch:
            each = np.broadcast_to(each / done.count**0.5, (done.batch, *each.shape[1:]))
        return list(zip(indices, each, strict=True))[: done.count]
