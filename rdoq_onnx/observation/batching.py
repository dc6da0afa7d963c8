"""Batching of samples: whether a network keeps the rows of axis 0 independent, and how many run together."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import CalibrationError, RdoqError
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.system.runtime import Runtime, Session

Array = NDArray[Any]

_MAX_BATCH_BYTES = 768 << 20  # of all tensors of one measured batch
_MAX_BATCH = 32  # samples
_MAX_FIXED_BATCH = 4096  # rows: a larger fixed axis 0 is not considered a batch


@dataclass(frozen=True)
class Batching:
    """size: samples per run. stackable: whether any number of samples can be stacked along axis 0.

    peak: elements of the largest sample over those of an average one.
    """

    size: int
    stackable: bool
    peak: float = 1.0


def separated(network: Network, samples: Samples, runtime: Runtime) -> Samples:
    """Return `samples`, with all rows of a run merged into one sample if the network mixes them.

    A fixed axis 0 need not be a batch axis. It is one if replacing the first or the last row leaves the other rows
    unchanged. Raises CalibrationError if too few samples are left to hold some out.
    """
    result = samples if _is_batch_axis(network, samples, runtime) else samples.inseparable()
    runs = len(result) // (result.batch or 1)
    if runs < 2:
        size = result.rows * (result.batch or 1)
        kind = "sample" if size == 1 else f"batch of {size}"
        raise CalibrationError(
            f"{samples.source} holds {runs} {kind}; at least 2 are needed, one to measure and one to verify"
        )
    return result


def _run_error(samples: Samples, error: RdoqError) -> CalibrationError:
    if samples.source != "synthetic":
        return CalibrationError(f"the float model does not run on the samples from {samples.source}: {error}")
    shapes = ", ".join(f"{n!r} {list(a.shape)}" for n, a in (*samples.arrays.items(), *samples.constants.items()))
    return CalibrationError(
        f"the float model does not run on synthetic samples ({shapes}): their free sizes and integers are guesses; "
        f"give real samples with --calibration samples.npz ({error})"
    )


def _is_batch_axis(network: Network, samples: Samples, runtime: Runtime) -> bool:
    if samples.batch is None or samples.batch == 1:
        return True
    if samples.batch > _MAX_FIXED_BATCH:
        return False
    names = list(dict.fromkeys([o.name for o in network.model.graph.output] + observed_tensors(network)))
    session = runtime.session(with_outputs(network.model, names), "all")
    last = samples.batch - 1
    orders = (np.arange(last + 1), np.array([last, *range(1, last + 1)]), np.array([*range(last), 0]))
    try:
        runs = [session.run(samples.feeds(order)) for order in orders]
    except RdoqError as error:
        raise _run_error(samples, error) from error
    return all(_rows_independent(samples.batch, *map(np.asarray, values)) for values in zip(*runs, strict=True))


def observed_tensors(network: Network) -> list[str]:
    """Return quantized activations, the tensors that carry their values to layers, and their inputs and outputs."""
    activations = [a.tensor for a in network.activations]
    feeding = [f for a in network.activations for f in a.feeds]
    layers = [n for x in network.layers for u in x.uses for n in (u.data, u.output)]
    products = [p.output for p in network.products]
    return list(dict.fromkeys([*activations, *feeding, *layers, *products]))


def _rows_independent(batch: int, value: Array, first: Array, last: Array) -> bool:
    """Whether `first` equals `value` except in the first sample, and `last` except in the last one."""
    if value.ndim == 0 or not value.shape == first.shape == last.shape or len(value) % batch:
        return False
    rows = len(value) // batch
    return close(value[rows:], first[rows:]) and close(value[:-rows], last[:-rows])


def find_batching(session: Session, samples: Samples, names: Sequence[str]) -> tuple[Batching, dict[str, int]]:
    """Find out by trial whether samples can share a batch; also return each tensor's elements per sample.

    They can if two samples in one batch give every tensor the rows that each sample gives alone. Where shapes differ,
    the elements are those of an average sample.
    """
    step = samples.batch or 1
    try:
        sizes, largest = _sizes(session, samples, names)
        pair = _pair(samples)
        alone = [session.run(feeds) for feeds in pair]
    except RdoqError as error:
        raise _run_error(samples, error) from error
    peak = largest / max(sum(sizes.values()), 1) if samples.others else 1.0
    together = None
    if len(alone) == 2 and samples.batch is None:
        with contextlib.suppress(RdoqError):
            together = session.run(_stacked(samples, *pair))
    if together is None or not all(_is_stacked(t, a, b) for t, a, b in zip(together, *alone, strict=True)):
        return Batching(step, False, peak), sizes
    return Batching(batch_size(largest), True, peak), sizes


def batch_size(elements: int) -> int:
    """Return the samples of a run if the tensors of the largest one have so many `elements`."""
    each = 4 * 3 * elements  # bytes of a sample
    return int(np.clip(_MAX_BATCH_BYTES // max(each, 1), 1, _MAX_BATCH))


def _sizes(session: Session, samples: Samples, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Return the elements of each tensor in an average sample, and of all of them in the largest."""
    step = samples.batch or 1
    total, largest = dict.fromkeys(names, 0), 0
    for part in samples.by_shape():
        values = session.run(next(part.batches(1)))
        sizes = {n: int(v.size) // step for n, v in zip(session.outputs, values, strict=True) if n in total}
        largest = max(largest, sum(sizes.values()))
        total = {n: total[n] + len(part) * size for n, size in sizes.items()}
    return {n: round(size / len(samples)) for n, size in total.items()}, largest


def _pair(samples: Samples) -> list[dict[str, Array]]:
    """Return the feeds of two samples of one shape, cut to one if all differ; of a single one if there is but one."""
    common = samples.of_common_shapes(1)
    pair = [feeds for _, feeds in itertools.islice(common.counted_batches(1), 2)]
    if len(pair) == 2 or len(samples) < 2 or samples.batch is not None:
        return pair
    pair = [feeds for _, feeds in itertools.islice(samples.counted_batches(1), 2)]
    cut = {name: tuple(map(slice, np.minimum(a.shape, pair[1][name].shape))) for name, a in pair[0].items()}
    return [{name: a[cut[name]] for name, a in feeds.items()} for feeds in pair]


def _stacked(samples: Samples, first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
    return {k: v if k in samples.constants else np.concatenate([v, second[k]]) for k, v in first.items()}


def _is_stacked(both: Array, first: Array, second: Array) -> bool:
    """Whether `both` is `first` stacked on `second` along axis 0, up to rounding."""
    both, first, second = np.asarray(both), np.asarray(first), np.asarray(second)
    if first.ndim == 0 or both.shape != (len(first) + len(second), *first.shape[1:]):
        return False
    return close(np.concatenate([first, second]), both)


def close(expected: Array, actual: Array) -> bool:
    """Whether two runs computed the same, up to rounding."""
    if expected.dtype.kind != "f":
        return bool((expected == actual).all())
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    return bool(np.abs(expected - actual).max(initial=0) <= 1e-3 * scale)
