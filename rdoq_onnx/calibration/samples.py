"""Specs of a model's inputs, and samples to feed them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from rdoq_onnx.calibration.rows import Rows, blocks, evenly
from rdoq_onnx.errors import ModelError

Array = NDArray[Any]


@dataclass(frozen=True)
class InputSpec:
    """An input of the model. None in `shape` stands for a free dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples by input name, along axis 0; only the requested ones are in memory.

    source: where they come from, for messages. constants: inputs that are the same in every run. batch: the model's
    fixed batch size, None if free. rows: rows of axis 0 per sample; more than one where the model mixes them.
    picked: the selected rows of the arrays, those of one shape together; None for all. others: arrays of further
    shapes, whose rows are numbered after those of `arrays`. No batch mixes shapes. labels: the class of each of these
    rows, if known. supplied: inputs that the source leaves out, whose values are plain (supplied.py).
    """

    source: str
    arrays: Mapping[str, Rows]
    constants: Mapping[str, Array] = field(default_factory=dict)
    batch: int | None = None
    rows: int = 1
    picked: NDArray[np.int64] | None = None
    others: tuple[Mapping[str, Rows], ...] = ()
    labels: NDArray[np.int64] | None = None
    supplied: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._picked) // self.rows

    def feeds(self, chosen: Any) -> dict[str, Array]:
        """The feeds for the samples `chosen` (indices or a slice). Raises ValueError if their shapes differ."""
        rows = self._rows_of(chosen)
        shapes = self._shape_of(rows)
        if (shapes != shapes[:1]).any():
            raise ValueError("samples of different shapes do not fit into one batch")
        shape = int(shapes[0]) if len(shapes) else 0
        return {name: a[rows - self._starts[shape]] for name, a in self._groups[shape].items()} | dict(self.constants)

    def inseparable(self) -> "Samples":
        """Treat all rows of a run as one sample."""
        return replace(self, rows=self.rows * (self.batch or 1), batch=1)

    def counted_batches(self, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield (number of samples, feeds) in batches of `size`, or of the model's `batch`.

        The last batch of each shape may be smaller.
        """
        for start, stop in self.spans(size):
            yield stop - start, self.feeds(slice(start, stop))

    def spans(self, size: int) -> list[tuple[int, int]]:
        """The first sample of each of these batches and the one behind its last."""
        step = self.batch or size
        return [(k, min(k + step, end)) for first, end in self._spans() for k in range(first, end, step)]

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Yield the feeds of `counted_batches`."""
        return (feeds for _, feeds in self.counted_batches(size))

    def take(self, chosen: Any) -> "Samples":
        rows = self._rows_of(chosen)
        return replace(self, picked=rows[np.argsort(self._shape_of(rows), kind="stable")] if self.others else rows)

    def joined(self, other: "Samples") -> "Samples":
        """Return these samples and, behind them, those of `other`, which has the same inputs; none with a label."""
        picked = np.concatenate([self._picked, other._picked + self._ends[-1]])
        return replace(self, picked=picked, others=(*self.others, *other._groups), labels=None)

    def by_shape(self) -> list["Samples"]:
        """Samples of one shape each."""
        return [self.take(slice(*span)) for span in self._spans()] if self.others else [self]

    def of_common_shapes(self, most: int) -> "Samples":
        """Take those of the `most` shapes that have the most samples; of equally frequent shapes evenly spaced ones."""
        spans = self._spans()
        if len(spans) <= most:
            return self
        counts = np.array([end - first for first, end in spans])
        least = np.sort(counts)[-most]
        more, equal = np.flatnonzero(counts > least), np.flatnonzero(counts == least)
        spread = equal[np.linspace(0, len(equal) - 1, most - len(more)).round().astype(int)]
        return self.take(np.concatenate([np.arange(*spans[k]) for k in np.union1d(more, spread)]))

    @property
    def largest(self) -> int:
        """The index of a sample of the largest shape."""
        firsts = [first for first, _ in self._spans()]
        return max(firsts, key=lambda k: sum(v.nbytes for v in self.feeds([k]).values()), default=0)

    def some(self, count: int) -> "Samples":
        """Take at most `count` evenly spaced samples, in whole batches if the model fixes their size."""
        step = self.batch or 1
        groups = len(self) // step
        if groups * step <= count:
            return self
        picked = evenly(groups, max(count // step, 1))
        return self.take((picked[:, None] * step + np.arange(step)).reshape(-1))

    def loaded(self, limit: int) -> "Samples":
        """Load all samples into memory if they take at most `limit` bytes; otherwise return `self`."""
        shapes = self._shape_of(self._picked)
        used = [(self._groups[k], self._picked[shapes == k], start) for k, start in enumerate(self._starts)]
        used = [each for each in used if len(each[1])]
        if not used or sum(_bytes(arrays) * len(rows) for arrays, rows, _ in used) > limit:
            return self
        labels = None if self.labels is None else self.labels[self._picked]
        first, *others = ({name: a[rows - start] for name, a in arrays.items()} for arrays, rows, start in used)
        return replace(self, arrays=first, picked=None, others=tuple(others), labels=labels)

    def split(self, fraction: float, seed: int) -> tuple["Samples", "Samples"]:
        """Split at random into two disjoint parts, with `fraction` in the first; each keeps the order of the samples.

        Neither is empty unless there is only one sample (one batch, if the model fixes its size).
        """
        step = self.batch or 1
        groups = len(self) // step
        first = int(np.clip(round(fraction * groups), 1, max(groups - 1, 1)))
        chosen = np.zeros(groups, bool)
        chosen[np.random.default_rng(seed).permutation(groups)[:first]] = True
        rows = np.repeat(chosen, step)
        return self.take(np.flatnonzero(rows)), self.take(np.flatnonzero(~rows))

    @property
    def classes(self) -> NDArray[np.int64] | None:
        """The class of each sample, [samples]; None if not known, or if a sample is several rows."""
        return None if self.labels is None or self.rows > 1 else self.labels[self._picked]

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over names, dtypes, shapes and values. Reads every sample once."""
        state = hashlib.sha256()
        shapes = self._shape_of(self._picked)
        for k, start in enumerate(self._starts):
            picked = self._picked[shapes == k] - start
            if not len(picked):
                continue
            for name, rows in sorted((*self._groups[k].items(), *self.constants.items())):
                shape = rows.shape if name in self.constants else (len(picked), *rows.shape[1:])
                state.update(repr((name, rows.dtype.str, shape)).encode())
                for block in [rows[...]] if name in self.constants else blocks(rows, picked):
                    state.update(np.ascontiguousarray(block).tobytes())
        return state.hexdigest()

    def fixed_batch(self, specs: Sequence[InputSpec]) -> int | None:
        """The number of samples the model takes per run, None if free.

        It is 1 if a constant has a dimension of 1, which may stand for the batch.
        """
        if any(1 in value.shape for value in self.constants.values()):
            return 1
        fixed = [s.shape[0] for s in specs if s.name not in self.constants and s.shape[0] is not None]
        return min(fixed, default=None)

    @property
    def _groups(self) -> tuple[Mapping[str, Rows], ...]:
        return (self.arrays, *self.others)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """The number of the row behind those of each shape."""
        return np.cumsum([next((a.shape[0] for a in arrays.values()), 0) for arrays in self._groups])

    @cached_property
    def _starts(self) -> list[int]:
        """The number of the first row of each shape."""
        return [0, *self._ends[:-1].tolist()]

    @property
    def _picked(self) -> NDArray[np.int64]:
        return np.arange(self._ends[-1]) if self.picked is None else self.picked

    def _rows_of(self, chosen: Any) -> NDArray[np.int64]:
        whole = self._picked[: len(self) * self.rows].reshape(-1, self.rows)
        rows: NDArray[np.int64] = whole[chosen].reshape(-1)
        return rows

    def _shape_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `_groups` of each of `rows`."""
        return np.searchsorted(self._ends, rows, "right")

    def _spans(self) -> list[tuple[int, int]]:
        """The first sample of each shape and the one behind its last."""
        shapes = self._shape_of(self._rows_of(slice(None))[:: self.rows])
        edges = [0, *(np.flatnonzero(np.diff(shapes)) + 1).tolist(), len(shapes)]
        return [(first, end) for first, end in pairwise(edges) if end > first]


def _bytes(arrays: Mapping[str, Rows]) -> int:
    """Bytes of one row."""
    return sum(int(np.prod(a.shape[1:])) * a.dtype.itemsize for a in arrays.values())


def input_specs(model: ModelProto) -> tuple[InputSpec, ...]:
    """The graph inputs that are not initializers. Raises ModelError for one that no array can feed."""
    graph = model.graph
    constant = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    specs = []
    for value in graph.input:
        if value.name in constant:
            continue
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.elem_type:
            raise ModelError(f"input {value.name!r} has no rank or type; export the model with both")
        narrow = kind.elem_type == TensorProto.BFLOAT16  # NumPy lacks it; runtime.py takes float32 instead
        dtype = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT if narrow else kind.elem_type)
        if dtype.kind not in "fiub":
            found = "string" if dtype.kind == "O" else dtype
            raise ModelError(f"input {value.name!r} has type {found}; export it as float or integer")
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        specs.append(InputSpec(value.name, dtype, shape))
    return tuple(specs)
