"""Collate feeds into arrays of all samples, with one feed in memory at a time."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdoq_onnx.calibration.array_files import FileRows, Spool
from rdoq_onnx.calibration.samples import InputSpec, Rows, blocks
from rdoq_onnx.errors import CalibrationError, ModelError

NORMALIZATION = ("mean", "std")  # arrays that may accompany images; the same in every feed

EVERY = 10.0  # seconds between notes on how many feeds were read

Array = NDArray[Any]


def collate(
    label: str, feeds: Iterable[tuple[str, Any]], specs: Sequence[InputSpec], limit: int | None = None
) -> dict[str, Rows]:
    """Collate feeds of one or more samples each into arrays by name; stop after `limit` samples.

    feeds: pairs of a name for error messages and arrays by input name. An array with one dimension fewer than its input
    is a single sample.
    Raises CalibrationError if feeds are inconsistent.
    """
    names = {s.name for s in specs}
    fixed = {s.name for s in specs if not s.shape or s.shape[0] not in (None, 1, model_batch(specs))}
    fixed.update(n for n in NORMALIZATION if n not in names)
    ranks = {s.name: len(s.shape) for s in specs}
    first = ""
    with ExitStack() as stack:
        spools: dict[str, Spool] = {}
        constants: dict[str, Rows] = {}
        for item, feed in feeds:
            if not isinstance(feed, Mapping):
                raise CalibrationError(f"{label}: {item} is a {type(feed).__name__}; give a dict of arrays by name")
            collated = [*spools, *constants]
            first = first or item
            if collated and feed.keys() != set(collated):
                found = f"{item} has arrays {listed(feed)}, {first} has {listed(collated)}"
                raise CalibrationError(f"{label}: {found}; give the same in each")
            for name, value in feed.items():
                rows = value if isinstance(value, FileRows) else as_array(label, name, value)
                pair = f"{label}: {name!r} of {first} and {item}"
                if name in fixed or not rows.shape:
                    _check_same(pair, constants.setdefault(name, rows), rows)
                    continue
                rank = ranks.get(name, len(specs[0].shape) if len(specs) == 1 else len(rows.shape))
                rows = rows[...][None] if len(rows.shape) == rank - 1 else rows
                if name not in spools:
                    spools[name] = stack.enter_context(Spool(rows.shape[1:], rows.dtype))
                _check_consistent(pair, spools[name], rows)
                for block in blocks(rows, np.arange(rows.shape[0])):
                    spools[name].append(block)
            if limit is not None and any(s.count >= limit for s in spools.values()):
                break
        if not spools and not constants:
            raise CalibrationError(f"{label}: no samples; give at least one")
        return constants | {name: spool.rows() for name, spool in spools.items()}


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


def _check_consistent(pair: str, spool: Spool, rows: Rows) -> None:
    if spool.sample != rows.shape[1:]:
        raise CalibrationError(f"{pair} has shapes {spool.sample} and {rows.shape[1:]}; pad or resize to one shape")
    if spool.dtype != rows.dtype:
        raise CalibrationError(f"{pair} is {spool.dtype} and {rows.dtype}; give one dtype")


def _check_same(pair: str, first: Rows, other: Rows) -> None:
    if first.shape != other.shape:
        raise CalibrationError(f"{pair} has shapes {first.shape} and {other.shape}; give the same value in each")
    if first is not other and not np.array_equal(first[...], other[...]):
        raise CalibrationError(f"{pair} differs, but the input has no batch axis; give the same value in each")
