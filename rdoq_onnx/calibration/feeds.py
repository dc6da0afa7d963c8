"""Collate feeds into arrays of all samples, with one feed in memory at a time."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdoq_onnx.calibration.array_files import FileRows, Spool
from rdoq_onnx.calibration.loaders import LABELS, as_feed
from rdoq_onnx.calibration.rows import Rows, blocks
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.errors import CalibrationError, ModelError

NORMALIZATION = ("mean", "std")  # arrays that may accompany images; the same in every feed
EXTRA_ARRAYS = (LABELS, *NORMALIZATION)  # labels and normalization, which may be stored with the samples

EVERY = 10.0  # seconds between notes on how many feeds were read

Array = NDArray[Any]


def collate(
    label: str, feeds: Iterable[tuple[str, Any]], specs: Sequence[InputSpec], limit: int | None = None
) -> list[dict[str, Rows]]:
    """Collate feeds of one or more samples each into arrays by name, for each shape; stop after `limit` samples.

    feeds: pairs of a name for error messages and what `as_feed` takes. An array with one dimension fewer than its input
    is a single sample. Shapes differ where the model leaves them free; the arrays come in the order of their size.
    Raises CalibrationError if feeds are inconsistent.
    """
    with ExitStack() as stack:
        spools = _Spools(label, specs, stack)
        for item, feed in feeds:
            spools.add(item, feed)
            if limit is not None and spools.count >= limit:
                break
        return spools.arrays()


class _Spools:
    """Feeds so far: one file per input. shapes: by the shapes of its samples, where each sample starts."""

    def __init__(self, label: str, specs: Sequence[InputSpec], stack: ExitStack) -> None:
        names = {s.name for s in specs}
        self._label, self._specs, self._stack = label, {s.name: s for s in specs}, stack
        self._fixed = {s.name for s in specs if not s.shape or s.shape[0] not in (None, 1, model_batch(specs))}
        self._fixed.update(n for n in NORMALIZATION if n not in names)
        self._first = ""
        self._names: tuple[str, ...] = ()
        self._spools: dict[str, Spool] = {}
        self._constants: dict[str, Rows] = {}
        self._labels: list[Array] = []
        self._shapes: dict[tuple[tuple[int, ...], ...], dict[str, list[int]]] = {}

    @property
    def count(self) -> int:
        return max((s.count for s in self._spools.values()), default=0)

    def add(self, item: str, feed: Any) -> None:
        feed = as_feed(self._label, item, feed, tuple(self._specs.values()))
        self._first = self._first or item
        self._names = self._names or tuple(feed)
        if feed.keys() != set(self._names):
            found = f"{item} has arrays {listed(feed)}, {self._first} has {listed(self._names)}"
            raise CalibrationError(f"{self._label}: {found}; give the same in each")
        samples: dict[str, Rows] = {}
        for name in self._names:
            value = feed[name]
            if name == LABELS and name not in self._specs:
                self._add_labels(value)
                continue
            rows = value if isinstance(value, FileRows) else as_array(self._label, name, value)
            pair = f"{self._label}: {name!r} of {self._first} and {item}"
            if name in self._fixed or not rows.shape:
                _check_same(pair, self._constants.setdefault(name, rows), rows)
                continue
            samples[name] = rows[...][None] if len(rows.shape) == self._rank(name, rows) - 1 else rows
            self._check_consistent(pair, name, samples[name])
        self._append(samples)

    def _add_labels(self, value: Any) -> None:
        """Take classes, one integer a sample; anything else under their name, such as masks or words, is left out."""
        labels = value if isinstance(value, FileRows) else np.asarray(value)
        if labels.dtype.kind in "iu" and len(labels.shape) <= 1:
            self._labels.append(labels[...].reshape(-1))

    def _rank(self, name: str, rows: Rows) -> int:
        spec = self._spec(name)
        return len(rows.shape) if spec is None else len(spec.shape)

    def _spec(self, name: str) -> InputSpec | None:
        """The input that `name` goes to; a single input takes an array of any name."""
        return self._specs.get(name, next(iter(self._specs.values())) if len(self._specs) == 1 else None)

    def _append(self, samples: Mapping[str, Rows]) -> None:
        key = tuple(rows.shape[1:] for rows in samples.values())
        starts = self._shapes.setdefault(key, {name: [] for name in samples})
        for name, rows in samples.items():
            if name not in self._spools:
                self._spools[name] = self._stack.enter_context(Spool(rows.shape[1:], rows.dtype))
            spool, each = self._spools[name], int(np.prod(rows.shape[1:])) * rows.dtype.itemsize
            starts[name] += range(spool.size, spool.size + rows.shape[0] * each, each) if each else [0] * rows.shape[0]
            for block in blocks(rows, np.arange(rows.shape[0])):
                spool.append(block)

    def arrays(self) -> list[dict[str, Rows]]:
        if not self._spools and not self._constants:
            raise CalibrationError(f"{self._label}: no samples; give at least one")
        if len(self._shapes) <= 1:
            return [self._constants | {name: spool.rows() for name, spool in self._spools.items()} | self._labelled()]
        ordered = sorted(self._shapes, key=lambda key: sum(int(np.prod(shape)) for shape in key))
        return [self._constants | self._of_shape(key) for key in ordered]

    def _labelled(self) -> dict[str, Rows]:
        """The class of each sample, if the feeds have them."""
        labels = np.concatenate([np.zeros(0, np.int64), *self._labels])
        return {LABELS: labels} if self._labels and labels.shape == (self.count,) else {}

    def _of_shape(self, key: tuple[tuple[int, ...], ...]) -> dict[str, Rows]:
        starts = self._shapes[key]
        named = zip(self._spools.items(), key, strict=True)
        return {name: spool.rows_at(starts[name], shape) for (name, spool), shape in named}

    def _check_consistent(self, pair: str, name: str, rows: Rows) -> None:
        spool, spec = self._spools.get(name), self._spec(name)
        if spool is None:
            return
        if spool.sample != rows.shape[1:] and not (spec is not None and _may_differ(spec, spool, rows)):
            raise CalibrationError(f"{pair} has shapes {spool.sample} and {rows.shape[1:]}; pad or resize to one shape")
        if spool.dtype != rows.dtype:
            raise CalibrationError(f"{pair} is {spool.dtype} and {rows.dtype}; give one dtype")


def _may_differ(spec: InputSpec, spool: Spool, rows: Rows) -> bool:
    """Whether the input leaves free the dimensions in which samples differ, as they are or as image bytes."""
    first, other, free = spool.sample, rows.shape[1:], spec.shape[1:]
    if not len(first) == len(other) == len(free):
        return False
    if rows.dtype == np.uint8 and len(free) == 3 and first[2] == other[2]:
        return None in free
    return all(size is None or a == b for size, a, b in zip(free, first, other, strict=True))


def watched(label: str, feeds: Iterable[Any], note: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """Yield feeds with their names for error messages; note now and then how many were read."""
    last = time.monotonic()
    for k, feed in enumerate(feeds):
        if (now := time.monotonic()) - last >= EVERY:
            last = now
            note(f"{label}: {k:,} feeds read")
        yield f"item {k}", feed


def has_length(feeds: Any) -> bool:
    try:
        return len(feeds) >= 0
    except Exception:  # the len() of ONNX Runtime's readers and of PyTorch's streams raises
        return False


def model_batch(specs: Sequence[InputSpec]) -> int | None:
    """The model's batch size, None if free. An input whose axis 0 is fixed to another size is not batched."""
    sizes = [s.shape[0] for s in specs if s.shape]
    if not sizes:
        raise ModelError("the model has no input with samples on axis 0; export it with a batch dimension")
    return None if None in sizes else 1 if 1 in sizes else sizes[0]


def as_array(label: str, name: str, value: ArrayLike) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise CalibrationError(f"{label}: {name!r} is ragged; pad its rows to one length") from error
    if array.dtype.hasobject:
        raise CalibrationError(f"{label}: {name!r} holds Python objects; give numbers only")
    return array


def listed(items: Iterable[Any]) -> str:
    return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)


def _check_same(pair: str, first: Rows, other: Rows) -> None:
    if first.shape != other.shape:
        raise CalibrationError(f"{pair} has shapes {first.shape} and {other.shape}; give the same value in each")
    if first is not other and not np.array_equal(first[...], other[...]):
        raise CalibrationError(f"{pair} differs, but the input has no batch axis; give the same value in each")
