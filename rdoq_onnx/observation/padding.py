"""Padding in calibration samples: cut off, so that it enters no statistic, no gradient and no distortion.

A mask is an input of zeros and ones, [N, T], that leaves T free. It is found by trial: the samples are cut to the
positions between the first and the last one that it keeps, and the model must compute the same there and in outputs
without T. So segment ids, which are zeros and ones as well, are no mask, and a mask whose ones stand for padding is.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.rows import Rows, evenly
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.observation.batching import close
from rdoq_onnx.system.runtime import Runtime, Session

_TRIALS = 4  # samples
_SEGMENTS = re.compile("type|segment", re.IGNORECASE)

Array = NDArray[Any]


@dataclass(frozen=True)
class _Cut:
    """Which positions are kept: those at `kept` in the input `mask`; axes: the axis of T of each input that has one."""

    mask: str
    kept: int
    axes: Mapping[str, int]

    def spans(self, mask: Array) -> NDArray[np.int64]:
        """Return (first, end) of what is kept of each row of `mask`, [rows, 2]; all of a row that keeps nothing."""
        kept = mask == self.kept
        kept[~kept.any(axis=1)] = True
        return np.stack([kept.argmax(axis=1), kept.shape[1] - kept[:, ::-1].argmax(axis=1)], axis=1)

    def feeds(self, feeds: Mapping[str, Array], first: int, end: int) -> dict[str, Array]:
        return {k: v[_slices(v.ndim, self.axes[k], first, end)] if k in self.axes else v for k, v in feeds.items()}


@dataclass(frozen=True, eq=False)
class _CutRows:
    """The input `name` of the samples `picked` of `part`, which share one shape; spans: what is kept along `axis`."""

    part: Samples
    name: str
    picked: NDArray[np.int64]
    axis: int | None
    spans: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.picked), *self[:1].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.part.arrays[self.name].dtype

    def __getitem__(self, rows: Any, /) -> Array:
        values: Array = self.part.feeds(self.picked[rows])[self.name]
        if self.axis is None:
            return values
        rank, axis = values.ndim - 1, self.axis - 1
        each = zip(values, self.spans[rows].tolist(), strict=True)
        return np.stack([value[_slices(rank, axis, *span)] for value, span in each])


def unpadded(model: onnx.ModelProto, samples: Samples, runtime: Runtime) -> Samples:
    """Return `samples` without padding, if an input of `model` is a mask; else as they are."""
    session: Session | None = None
    for cut in _candidates(model, samples):
        padded = _padded(cut, samples)
        if padded:
            session = session or runtime.session(model, "all")
            if all(_same(session, cut, part.feeds([k]), *span) for part, k, span in _spread(padded)):
                return _without(cut, samples)
    return samples


def presumably_unpadded(model: onnx.ModelProto, samples: Samples) -> Samples:
    """Return `samples` as `unpadded` does, but presume, without a run, that an input which may be a mask is one."""
    for cut in _candidates(model, samples):
        if cut.kept and _padded(cut, samples):
            return _without(cut, samples)
    return samples


def _candidates(model: onnx.ModelProto, samples: Samples) -> Iterator[_Cut]:
    """Yield each input that may be a mask, with either value as the one to keep."""
    if samples.source == "synthetic" or samples.batch not in (None, 1):
        return
    dimensions = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input}
    for name, rows in samples.arrays.items():
        free = dimensions[name]
        if len(free) != 2 or free[1].dim_value or rows.dtype.kind not in "iub" or _SEGMENTS.search(name):
            continue
        if not all(np.isin(batch[name], (0, 1)).all() for batch in samples.batches(64)):
            continue
        # Decoders name T of the mask apart from that of the tokens, since it also counts those in the caches.
        for size in dict.fromkeys((free[1].dim_param, "")):
            axes = {other: _axis(dimensions[other], size, samples, other, name) for other in samples.arrays}
            found = {other: axis for other, axis in axes.items() if axis is not None}
            if len(found) > 1:
                yield from (_Cut(name, kept, found) for kept in (1, 0))
                break


def _axis(dimensions: Any, name: str, samples: Samples, tensor: str, mask: str) -> int | None:
    """Return the axis of `tensor` that is T: free, of its name if it has one, and as long in all samples."""
    groups = (samples.arrays, *samples.others)
    for axis, dimension in enumerate(dimensions):
        named = not name or not dimension.dim_param or dimension.dim_param == name
        same = all(len(g[tensor].shape) > axis and g[tensor].shape[axis] == g[mask].shape[1] for g in groups)
        if axis and not dimension.dim_value and named and same:
            return axis
    return None


def _padded(cut: _Cut, samples: Samples) -> list[tuple[Samples, int, tuple[int, int]]]:
    """Return (samples of one shape, index of one that is padded, what is kept of it)."""
    found = []
    for part in samples.by_shape():
        mask = part.feeds(slice(None))[cut.mask]
        for k, (first, end) in enumerate(cut.spans(mask).tolist()):
            if end - first < mask.shape[1]:
                found.append((part, k, (first, end)))
    return found


def _spread(found: list[Any]) -> list[Any]:
    return [found[k] for k in evenly(len(found), _TRIALS)]


def _same(session: Session, cut: _Cut, feeds: Mapping[str, Array], first: int, end: int) -> bool:
    """Whether the model computes the same from a sample that is cut to what is kept."""
    length = feeds[cut.mask].shape[1]
    try:
        whole, part = session.run(feeds), session.run(cut.feeds(feeds, first, end))
    except RdoqError:
        return False
    for long, short in zip(map(np.asarray, whole), map(np.asarray, part), strict=True):
        differing = [k for k, (a, b) in enumerate(zip(long.shape, short.shape, strict=True)) if a != b]
        if any((long.shape[k], short.shape[k]) != (length, end - first) for k in differing):
            return False
        for axis in differing:
            long = long[_slices(long.ndim, axis, first, end)]
        if not close(long, short):
            return False
    return True


def _without(cut: _Cut, samples: Samples) -> Samples:
    """Return `samples` cut to what is kept, by shape."""
    groups: list[tuple[int, dict[str, Rows], Array | None]] = []
    for part in samples.by_shape():
        spans = cut.spans(part.feeds(slice(None))[cut.mask])
        lengths = spans[:, 1] - spans[:, 0]
        for length in np.unique(lengths).tolist():
            picked = np.flatnonzero(lengths == length)
            rows = {k: _CutRows(part, k, picked, cut.axes.get(k), spans[picked]) for k in samples.arrays}
            groups.append((length, dict(rows), None if part.classes is None else part.classes[picked]))
    groups.sort(key=lambda group: group[0])
    first, *others = (arrays for _, arrays, _ in groups)
    classes = [labels for *_, labels in groups if labels is not None]
    labels = np.concatenate(classes) if classes else None
    return replace(samples, arrays=first, picked=None, others=tuple(others), labels=labels)


def _slices(rank: int, axis: int, first: int, end: int) -> tuple[slice, ...]:
    return tuple(slice(first, end) if k == axis else slice(None) for k in range(rank))
