"""Where calibration samples come from, and whether they fit the model.

A sample is a row on axis 0 of every input that batches. Inputs that do not (a sampling rate, a recurrent
state) are constants: the same array in every run.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdoq_onnx import io
from rdoq_onnx.errors import CalibrationError, ModelError
from rdoq_onnx.samples import InputSpec, Samples
from rdoq_onnx.synthesis import draw

BESIDE = ("y", "mean", "std")  # labels and normalisation, which may lie beside the samples

Array = NDArray[Any]


class Reader(Protocol):
    """ONNX Runtime's CalibrationDataReader: feeds one by one, then None."""

    def get_next(self) -> Mapping[str, ArrayLike] | None: ...


Source = str | Path | Mapping[str, ArrayLike] | Iterable[Mapping[str, ArrayLike]] | Reader


def load_samples(source: Source, specs: Sequence[InputSpec], limit: int | None, seed: int = 0) -> Samples:
    """At most `limit` samples, evenly spaced over those of `source`, as the inputs `specs` want them.

    source: path of an .npz or .npy, arrays by name, feeds, or an object with ONNX Runtime's get_next().
    Raises CalibrationError where they do not fit.
    """
    label, stored = _read(source, specs)
    given = _by_input(label, stored, specs)
    for spec in specs:
        _check_rank(label, given[spec.name], spec)
    count, constants = _count(label, given, specs)
    samples = Samples(label, given, constants)
    samples = replace(samples, batch=samples.fixed_batch(specs))
    step = samples.batch or 1
    if count % step:
        raise CalibrationError(f"{label}: {count} samples, the model takes {step} at a time; give a multiple")
    if limit is not None and limit < count:
        samples = samples.take(np.linspace(0, count - 1, max(limit // step, 1) * step).astype(int))
    beside = {name: stored[name] for name in BESIDE if name in stored and name not in given}
    fitted = {s.name: _fit(label, samples.arrays[s.name], s, beside, s.name in constants) for s in specs}
    return replace(samples, arrays=fitted)


def synthetic(
    specs: Sequence[InputSpec],
    count: int,
    seed: int,
    integer_ranges: Mapping[str, int] = MappingProxyType({}),
) -> Samples:
    """Random samples: dead leaves for images, normal floats, integers below `integer_ranges` or else 2.

    There are `count` of them, or up to the next multiple of the model's own batch, at least two batches.
    """
    batch = _model_batch(specs)
    count = max(-(-count // (batch or 1)), 2) * (batch or 1)
    constants = frozenset(s.name for s in specs if not s.shape or s.shape[0] not in (None, batch))
    arrays = {}
    for position, spec in enumerate(specs):
        rng = np.random.default_rng([seed, position])
        arrays[spec.name] = draw(rng, spec, None if spec.name in constants else count, integer_ranges)
    samples = Samples("synthetic", arrays, constants)
    return replace(samples, batch=samples.fixed_batch(specs))


def _read(source: Source, specs: Sequence[InputSpec]) -> tuple[str, dict[str, Array]]:
    """(name for the user, arrays) of any source."""
    if isinstance(source, str | Path):
        return str(source), io.read_arrays(source)
    if isinstance(source, Mapping):
        return "arrays", {name: _array("arrays", name, value) for name, value in source.items()}
    get_next = getattr(source, "get_next", None)
    if get_next is not None:
        return "data reader", _collate("data reader", iter(get_next, None), specs)
    if isinstance(source, Iterable):
        return "feeds", _collate("feeds", source, specs)
    raise CalibrationError(f"calibration is a {type(source).__name__}; give a path, arrays by name, or feeds")


def _array(label: str, name: str, value: ArrayLike) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise CalibrationError(f"{label}: {name!r} is no array; pad its rows to one length") from error


def _collate(label: str, feeds: Iterable[Any], specs: Sequence[InputSpec]) -> dict[str, Array]:
    """Feeds of one or more samples -> arrays of all of them."""
    parts: dict[str, list[Array]] = {}
    for number, feed in enumerate(feeds):
        if not isinstance(feed, Mapping):
            raise CalibrationError(f"{label}: item {number} is a {type(feed).__name__}; give arrays by name")
        if number and feed.keys() != parts.keys():
            raise CalibrationError(f"{label}: item {number} has arrays {_list(feed)}, item 0 has "
                                   f"{_list(parts)}; give the same in each")  # fmt: skip
        for name, value in feed.items():
            parts.setdefault(name, []).append(_array(label, name, value))
    if not parts:
        raise CalibrationError(f"{label}: no samples; give at least one")
    batch = _model_batch(specs)
    constants = {s.name for s in specs if not s.shape or s.shape[0] not in (None, 1, batch)}
    return {name: _join(label, name, arrays, name in constants) for name, arrays in parts.items()}


def _join(label: str, name: str, arrays: Sequence[Array], constant: bool) -> Array:
    shapes = dict.fromkeys(a.shape if constant else a.shape[1:] for a in arrays)
    if len(shapes) > 1:
        raise CalibrationError(f"{label}: {name!r} has shapes {_list(shapes)}; pad or resize to one")
    if not constant and arrays[0].ndim:
        return np.concatenate(arrays)
    if not all(np.array_equal(arrays[0], a) for a in arrays):
        raise CalibrationError(f"{label}: {name!r} has no samples on axis 0, yet changes; give it one value")
    return arrays[0]


def _by_input(label: str, stored: Mapping[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array]:
    """The array of each input; a single array serves a single input under any name."""
    names = [s.name for s in specs]
    others = [n for n in stored if n not in names and n not in BESIDE]
    if len(names) == len(others) == 1 and names[0] not in stored:
        return {names[0]: stored[others[0]]}
    known = f"the model's inputs: {_list(names)}; the arrays: {_list(stored) or 'none'}"
    for name in names:
        if name not in stored:
            near = difflib.get_close_matches(name, others, 1, 0)
            hint = f"rename {near[0]!r} or add it" if near else "add it"
            raise CalibrationError(f"{label}: no array for input {name!r}; {hint} ({known})")
    if others:
        raise CalibrationError(f"{label}: {others[0]!r} is no input; remove it ({known})")
    return {name: stored[name] for name in names}


def _check_rank(label: str, array: Array, spec: InputSpec) -> None:
    if array.ndim != len(spec.shape):
        raise CalibrationError(f"{label}: {spec.name!r} has shape {_shape(array.shape)}, but the model wants "
                               f"{_shape(spec.shape)}; give that many dimensions")  # fmt: skip


def _model_batch(specs: Sequence[InputSpec]) -> int | None:
    """The size of the samples axis, None if free; an input with another fixed axis 0 does not batch."""
    sizes = [s.shape[0] for s in specs if s.shape]
    if not sizes:
        raise ModelError("the model has no input with samples on axis 0; export it with a batch dimension")
    return None if None in sizes else 1 if 1 in sizes else sizes[0]


def _count(label: str, given: Mapping[str, Array], specs: Sequence[InputSpec]) -> tuple[int, frozenset[str]]:
    """(number of samples, the constants): those fill their input as they are, not a row for each sample."""
    batch = _model_batch(specs)
    filled = {s.name: s.shape[0] if s.shape else None for s in specs
              if not s.shape or s.shape[0] == len(given[s.name])}  # fmt: skip
    counts = {name: len(array) for name, array in given.items() if name not in filled}
    if len(set(counts.values())) > 1:
        raise CalibrationError(f"{label}: numbers of samples differ, {_list(counts.items())}; give as many of all")
    count = next(iter(counts.values()), batch)
    if not count:
        raise CalibrationError(f"{label}: {next(iter(counts), '')!r} holds no samples; give at least one")
    return count, frozenset(name for name, size in filled.items() if size != batch or size != count)


def _fit(label: str, array: Array, spec: InputSpec, beside: Mapping[str, Array], constant: bool) -> Array:
    """`array` as the model wants it: images normalised, dimensions checked, values of the input's type."""
    where = f"{label}: {spec.name!r}"
    image = array.dtype == np.uint8 and array.ndim == 4 and spec.dtype.kind == "f"
    if image and {"mean", "std"} <= beside.keys() and spec.shape[1] in (None, array.shape[3]):
        array = _normalise(where, array, beside["mean"], beside["std"])
    wanted = spec.shape if constant else (None, *spec.shape[1:])
    if any(size not in (None, found) for size, found in zip(wanted, array.shape, strict=True)):
        raise CalibrationError(f"{where} has shape {_shape(array.shape)}, but the model wants "
                               f"{_shape(spec.shape)}; resize, crop or transpose it")  # fmt: skip
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(f"{where} holds NaN or infinity; remove those samples")
    return _convert(where, array, spec.dtype)


def _normalise(where: str, array: Array, mean: Array, std: Array) -> Array:
    """(x / 255 - mean) / std, channels first."""
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            normal = (array.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2), np.float32)
    except ValueError as error:
        found = f"{array.shape[3]} channels, 'mean' and 'std' have shapes {mean.shape} and {std.shape}"
        raise CalibrationError(f"{where} has {found}; store one number a channel") from error


def _convert(where: str, array: Array, dtype: np.dtype[Any]) -> Array:
    """`array` as `dtype` where every value survives, up to rounding between floats."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind == dtype.kind == "f":
        with np.errstate(over="ignore"):
            converted = array.astype(dtype)
        if not np.isfinite(converted).all():
            raise CalibrationError(f"{where} holds values too large for the input's {dtype}; scale them")
        return converted
    if array.dtype.kind not in "iu" or dtype.kind not in "iu":
        hint = ", or store 'mean' and 'std' beside [N,H,W,C] images" if array.dtype == np.uint8 else ""
        raise CalibrationError(f"{where} is {array.dtype}, but the model wants {dtype}; convert it{hint}")
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        raise CalibrationError(f"{where} holds {low} to {high}, too wide for the input's {dtype}; check it")
    return array.astype(dtype)


def _list(items: Iterable[Any]) -> str:
    return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in items)


def _shape(shape: Sequence[int | None]) -> str:
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"
