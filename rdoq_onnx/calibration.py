"""Where calibration samples come from, and whether they fit the model.

A sample is a row on axis 0 of every input that batches. Inputs that do not (a sampling rate, a recurrent
state) are constants: the same array in every run.
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto, helper

from rdoq_onnx import io
from rdoq_onnx.errors import CalibrationError, ModelError

BESIDE = ("y", "mean", "std")  # labels and normalisation, which may lie beside the samples
SIDE = 224  # pixels of a synthetic image where the model leaves them free
LENGTH = 16  # of any other free dimension of a synthetic input
DISCS = 256  # in a synthetic image
CHROMA = 0.4  # standard deviation of one colour channel around the disc's brightness, which has 1
TEXTURE = 0.15  # standard deviation of the texture over the discs

Array = NDArray[Any]


class Reader(Protocol):
    """ONNX Runtime's CalibrationDataReader: feeds one by one, then None."""

    def get_next(self) -> Mapping[str, ArrayLike] | None: ...


Source = str | Path | Mapping[str, ArrayLike] | Iterable[Mapping[str, ArrayLike]] | Reader


@dataclass(frozen=True)
class InputSpec:
    """An input of the model. None in `shape` is a free dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples by input name, on axis 0 of all arrays but the `constants`.

    source: where they come from, for the user. batch: how many a run takes, None if the model leaves it free.
    """

    source: str
    arrays: Mapping[str, Array]
    constants: frozenset[str] = frozenset()
    batch: int | None = None

    def __len__(self) -> int:
        return next((len(a) for name, a in self.arrays.items() if name not in self.constants), 0)

    def feeds(self, rows: Any) -> dict[str, Array]:
        """What to feed for the samples `rows` (indices or a slice)."""
        return {name: a if name in self.constants else a[rows] for name, a in self.arrays.items()}

    def counted_batches(self, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """(number of samples, feeds) by `size`, or by the model's own `batch`; the last may be smaller."""
        step = self.batch or size
        for start in range(0, len(self), step):
            yield min(step, len(self) - start), self.feeds(slice(start, start + step))

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """The feeds of `counted_batches`."""
        return (feeds for _, feeds in self.counted_batches(size))

    def take(self, rows: Any) -> "Samples":
        return replace(self, arrays=self.feeds(rows))

    def split(self, fraction: float, seed: int) -> tuple["Samples", "Samples"]:
        """Two disjoint random parts, `fraction` in the first, in the order that the samples have here.

        Neither is empty unless there is only one sample, or one batch where the model fixes its size.
        """
        step = self.batch or 1
        groups = len(self) // step
        first = int(np.clip(round(fraction * groups), 1, max(groups - 1, 1)))
        chosen = np.zeros(groups, bool)
        chosen[np.random.default_rng(seed).permutation(groups)[:first]] = True
        rows = np.repeat(chosen, step)
        return self.take(np.flatnonzero(rows)), self.take(np.flatnonzero(~rows))

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and values, in hexadecimal."""
        state = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            state.update(repr((name, array.dtype.str, array.shape)).encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()

    def fixed_batch(self, specs: Sequence[InputSpec]) -> int | None:
        """How many samples the model takes in one run, None if any number.

        One at a time where a constant has a dimension of 1, since that may stand for the batch.
        """
        if any(1 in self.arrays[name].shape for name in self.constants):
            return 1
        fixed = [s.shape[0] for s in specs if s.name not in self.constants and s.shape[0] is not None]
        return min(fixed, default=None)


def input_specs(model: ModelProto) -> tuple[InputSpec, ...]:
    """The graph inputs that are no initializers. Raises ModelError on one that no array can feed."""
    graph = model.graph
    constant = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    specs = []
    for value in graph.input:
        if value.name in constant:
            continue
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.elem_type:
            raise ModelError(f"input {value.name!r} has no known rank and type; export it with both")
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind not in "fiub":
            raise ModelError(f"input {value.name!r} is of type {dtype}; export it as float or integer")
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        specs.append(InputSpec(value.name, dtype, shape))
    return tuple(specs)


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

    There are `count` of them, or up to the next multiple of the model's own batch.
    """
    batch = _model_batch(specs)
    count = -(-count // (batch or 1)) * (batch or 1)
    constants = frozenset(s.name for s in specs if not s.shape or s.shape[0] not in (None, batch))
    arrays = {}
    for position, spec in enumerate(specs):
        rng = np.random.default_rng([seed, position])
        arrays[spec.name] = _draw(rng, spec, None if spec.name in constants else count, integer_ranges)
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


def _draw(rng: np.random.Generator, spec: InputSpec, count: int | None, ranges: Mapping[str, int]) -> Array:
    """Random values for one input; `count` None makes a constant."""
    axis = None if count is None else _channel_axis(spec)
    if count is not None and axis is not None:
        sizes = [SIDE if size is None else size for k, size in enumerate(spec.shape) if k not in (0, axis)]
        images = _dead_leaves(rng, count, spec.shape[axis] or 1, *sizes)
        return np.ascontiguousarray(np.moveaxis(images, 1, axis), spec.dtype)
    free = 1 if count is None else LENGTH  # with 1, a constant runs with one sample
    shape = [free if size is None else size for size in spec.shape]
    if count is not None:
        shape[0] = count
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    if spec.dtype.kind == "b":
        return rng.random(shape) < 0.5
    high = min(max(ranges.get(spec.name, 2), 1), np.iinfo(spec.dtype).max)
    return rng.integers(0, high, shape, spec.dtype)


def _channel_axis(spec: InputSpec) -> int | None:
    """Where an image has its 1 or 3 channels, None if the input looks like no image."""
    if spec.dtype.kind != "f" or len(spec.shape) != 4:
        return None
    spatial = {1: spec.shape[2:], 3: spec.shape[1:3]}
    for axis, sizes in spatial.items():
        if spec.shape[axis] in (1, 3) and all(size is None or size >= 8 for size in sizes):
            return axis
    return None


def _dead_leaves(rng: np.random.Generator, count: int, channels: int, height: int, width: int) -> Array:
    """Images of discs over discs, radius of density r^-3: the occlusions and scale invariance of photographs.

    Lee, Mumford, Huang: Occlusion models for natural images (IJCV 2001). A weak 1/f texture fills the discs.
    Each channel has zero mean and unit variance over the set. Shape [count, channels, height, width].
    """
    images = np.stack([_dead_leaf(rng, channels, height, width) for _ in range(count)])
    images -= images.mean((0, 2, 3), np.float64, keepdims=True)
    images /= images.std((0, 2, 3), np.float64, keepdims=True)
    return images


def _dead_leaf(rng: np.random.Generator, channels: int, height: int, width: int) -> Array:
    side = max(height, width)
    least, most = max(side / 32, 1) ** -2, (side / 2) ** -2
    radii = (least - rng.random(DISCS) * (least - most)) ** -0.5
    centres = rng.random((DISCS, 2)) * (height, width)
    top = np.zeros((height, width), np.intp)  # number of the disc that lies on top
    for number, ((y, x), radius) in enumerate(zip(centres, radii, strict=True)):
        rows = np.arange(max(int(y - radius), 0), min(int(y + radius) + 1, height))
        columns = np.arange(max(int(x - radius), 0), min(int(x + radius) + 1, width))
        inside = (rows[:, None] - y) ** 2 + (columns - x) ** 2 < radius**2
        np.copyto(top[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], number, where=inside)
    brightness = rng.standard_normal((1, DISCS))
    colours = brightness + CHROMA * rng.standard_normal((channels, DISCS))
    return (colours[:, top] + TEXTURE * _texture(rng, height, width)).astype(np.float32)


def _texture(rng: np.random.Generator, height: int, width: int) -> Array:
    """Noise of amplitude 1/f, zero mean and unit variance."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency, (height, width))
    return np.asarray(noise / noise.std())
