"""Load calibration samples from any source and check that they fit the model.

A sample is a row along axis 0 of every batched input. Other inputs (a sampling rate, a recurrent state) are constants:
the same array in every run.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rdoq_onnx.calibration.array_files import read_arrays
from rdoq_onnx.calibration.conversion import convert_input, holds_images, shape_text
from rdoq_onnx.calibration.feeds import EXTRA_ARRAYS, as_array, collate, has_length, listed, model_batch, watched
from rdoq_onnx.calibration.folders import folder_arrays
from rdoq_onnx.calibration.pixels import DEFAULT_PIXELS, Pixels
from rdoq_onnx.calibration.rows import Rows, evenly
from rdoq_onnx.calibration.samples import InputSpec, Samples
from rdoq_onnx.calibration.supplied import TOKENS, could_supply, supplied
from rdoq_onnx.calibration.synthetic import draw
from rdoq_onnx.calibration.user_code import call
from rdoq_onnx.errors import CalibrationError

MAX_FEEDS = 1024  # samples taken of feeds without a length
_FUNCTION = r"([A-Za-z_][\w.]*):(\w+)"  # module:function

Array = NDArray[Any]
Note = Callable[[str], None]


class Reader(Protocol):
    """ONNX Runtime's CalibrationDataReader: feeds one by one, then None."""

    def get_next(self) -> Mapping[str, ArrayLike] | None: ...


Source = str | Path | Mapping[str, ArrayLike] | Iterable[Mapping[str, ArrayLike]] | Reader


def load_samples(
    source: Source,
    specs: Sequence[InputSpec],
    limit: int | None,
    pixels: Pixels = DEFAULT_PIXELS,
    note: Note = lambda text: None,
) -> Samples:
    """Load at most `limit` samples from `source`, in the shapes and dtypes of the inputs `specs`.

    source: path of an .npz, .npy or folder, "module:function", arrays by name, feeds, or an object with ONNX Runtime's
    get_next(). Takes evenly spaced samples of files and arrays, but the first ones of feeds, which may never end; at
    most MAX_FEEDS of feeds without a length if `limit` is None. Integers [N] under "y" are the samples' classes.
    pixels: image normalization. note: called with how far the reading of feeds is.
    Reads every sample once; raises CalibrationError if one does not fit.
    """
    label, found, limit = _read(source, specs, limit, note)
    given = [_named(part, specs) for part in found]
    stored = [arrays | supplied(arrays, specs, numbers=len(found) == 1) for arrays in given]
    parts = [_samples(label, arrays, specs, pixels) for arrays in stored]
    images = (holds_images(_by_input(label, arrays, specs)[s.name], s) for arrays in stored for s in specs)
    if pixels.is_set and not any(images):
        raise CalibrationError(
            f"{label} holds no images as bytes, so --image-mean, --image-std and --image-scale "
            "do not apply; leave them out"
        )
    samples = parts[0]
    if len(parts) > 1:
        samples = replace(samples, others=tuple(part.arrays for part in parts[1:]), labels=None)
        samples = samples if limit is None else samples.some(limit)
    else:
        samples = replace(samples, picked=evenly(len(samples), limit, samples.batch or 1))
    len(samples.digest)  # converts, and thereby checks, all values before the long work
    return replace(samples, supplied=tuple(s.name for s in specs if s.name not in given[0]))


def _samples(label: str, stored: Mapping[str, Rows], specs: Sequence[InputSpec], pixels: Pixels) -> Samples:
    """Check and convert arrays of one shape."""
    inputs = _by_input(label, stored, specs)
    for spec in specs:
        _check_rank(label, inputs[spec.name], spec)
    count, fixed = _count(label, inputs, specs)
    samples = Samples(label, {n: a for n, a in inputs.items() if n not in fixed}, {n: inputs[n][...] for n in fixed})
    samples = replace(samples, batch=samples.fixed_batch(specs))
    step = samples.batch or 1
    if count % step:
        raise CalibrationError(f"{label}: {count} samples, the model takes {step} at a time; give a multiple of {step}")
    extra = {name: stored[name][...] for name in EXTRA_ARRAYS if name in stored and name not in inputs}
    labels = extra.get("y")
    classes = labels is not None and labels.dtype.kind in "iu" and labels.shape == (count,)
    converted = {s.name: convert_input(label, inputs[s.name], s, extra, pixels, s.name in fixed) for s in specs}
    return replace(
        samples,
        arrays={n: converted[n] for n in samples.arrays},
        constants={n: converted[n][...] for n in samples.constants},
        labels=labels.astype(np.int64) if labels is not None and classes else None,
    )


def synthetic(
    specs: Sequence[InputSpec],
    count: int,
    seed: int,
    integer_ranges: Mapping[str, int] = MappingProxyType({}),
) -> Samples:
    """Draw random samples: dead leaves for images, normal floats, integers below `integer_ranges` or else below 2.

    Inputs that follow from drawn tokens (supplied.py) are not random. Rounds `count` up to a multiple of the model's
    batch, and to at least two batches.
    """
    batch = model_batch(specs)
    count = max(-(-count // (batch or 1)), 2) * (batch or 1)
    arrays, constants = {}, {}
    for position, spec in enumerate(specs):
        rng = np.random.default_rng([seed, position])
        if not spec.shape or spec.shape[0] not in (None, batch):
            constants[spec.name] = draw(rng, spec, None, integer_ranges)
        else:
            arrays[spec.name] = draw(rng, spec, count, integer_ranges)
    given = supplied({name: rows for name, rows in arrays.items() if name in TOKENS}, specs)
    for drawn in (arrays, constants):
        drawn.update({name: rows for name, rows in given.items() if name in drawn})
    samples = Samples("synthetic", arrays, constants, supplied=tuple(given))
    return replace(samples, batch=samples.fixed_batch(specs))


def _read(
    source: Source, specs: Sequence[InputSpec], limit: int | None, note: Note
) -> tuple[str, list[Mapping[str, Rows]], int | None]:
    """Read any source; return its name for messages, its arrays by shape, and how many samples of them to take."""
    if isinstance(source, str | Path):
        path = Path(source)
        function = re.fullmatch(_FUNCTION, str(source))
        if not function or path.exists():
            return str(source), [*folder_arrays(path, specs, limit)] if path.is_dir() else [read_arrays(path)], limit
        made = call(str(source), *function.groups())
        if isinstance(made, str) and re.fullmatch(_FUNCTION, made):
            raise CalibrationError(f"{source}: returns {made!r}; return feeds, arrays or a path")
        return (str(source), *_read(made, specs, limit, note)[1:])
    if isinstance(source, Mapping):
        return "arrays", [{name: as_array("arrays", name, value) for name, value in source.items()}], limit
    get_next = getattr(source, "get_next", None)
    label = "feeds" if get_next is None else "data reader"
    feeds = source if get_next is None else iter(get_next, None)
    if not isinstance(feeds, Iterable):
        raise CalibrationError(f"calibration is a {type(source).__name__}; give a path, arrays by name, or feeds")
    if limit is not None or has_length(source):
        return label, [*collate(label, watched(label, feeds, note), specs, limit)], limit
    arrays: list[Mapping[str, Rows]] = [*collate(label, watched(label, feeds, note), specs, MAX_FEEDS)]
    if sum(max((rows.shape[0] for rows in shape.values() if rows.shape), default=0) for shape in arrays) >= MAX_FEEDS:
        note(f"{label}: took the first {MAX_FEEDS:,} samples, as the number is not known; --samples sets another")
    return label, arrays, MAX_FEEDS


def _named(stored: Mapping[str, Rows], specs: Sequence[InputSpec]) -> dict[str, Rows]:
    """Give a single array to the only input that needs one, whatever its name."""
    names = {s.name for s in specs}
    others = [n for n in stored if n not in names and n not in EXTRA_ARRAYS]
    needing = [s.name for s in specs if len(specs) == 1 or not could_supply(s)]
    if len(needing) == len(others) == 1 and needing[0] not in stored:
        return {needing[0] if name == others[0] else name: rows for name, rows in stored.items()}
    return dict(stored)


def _by_input(label: str, stored: Mapping[str, Rows], specs: Sequence[InputSpec]) -> dict[str, Rows]:
    """The array of each input."""
    names = [s.name for s in specs]
    others = [n for n in stored if n not in names and n not in EXTRA_ARRAYS]
    context = f"the model's inputs: {listed(names)}; the arrays: {listed(stored) or 'none'}"
    for name in names:
        if name not in stored:
            near = difflib.get_close_matches(name, others, 1, 0)
            hint = f"rename {near[0]!r} or add it" if near else "add it"
            raise CalibrationError(f"{label}: no array for input {name!r}; {hint} ({context})")
    if others:
        raise CalibrationError(f"{label}: array {others[0]!r} is not an input of the model; remove it ({context})")
    return {name: stored[name] for name in names}


def _check_rank(label: str, rows: Rows, spec: InputSpec) -> None:
    if len(rows.shape) != len(spec.shape):
        raise CalibrationError(
            f"{label}: {spec.name!r} has shape {shape_text(rows.shape)}, but the model expects "
            f"{shape_text(spec.shape)}; give that many dimensions"
        )


def _count(label: str, inputs: Mapping[str, Rows], specs: Sequence[InputSpec]) -> tuple[int, frozenset[str]]:
    """The number of samples, and the names of the constants: arrays that fill their input whole, not row by row."""
    batch = model_batch(specs)
    filled = {
        s.name: s.shape[0] if s.shape else None for s in specs if not s.shape or s.shape[0] == inputs[s.name].shape[0]
    }
    counts = {name: rows.shape[0] for name, rows in inputs.items() if name not in filled}
    if len(set(counts.values())) > 1:
        raise CalibrationError(
            f"{label}: numbers of samples differ: {listed(counts.items())}; give the same number for each input"
        )
    count = next(iter(counts.values()), batch)
    if not count:
        raise CalibrationError(f"{label}: {next(iter(counts), '')!r} holds no samples; give at least one")
    return count, frozenset(name for name, size in filled.items() if size != batch or size != count)
