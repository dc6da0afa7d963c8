"""Judge trials ahead of their turn, in other processes.

A trial depends on those before it only through the one that is kept. Most fail, so the next ones are judged on the
assumption that all before them do: results come in order, and the caller stops at the first that it keeps. The outcome
is that of judging one after another, whatever the number of processes. As each that is kept makes those behind it
useless, and some are dear to make, more are judged together only once as many have failed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.model.external import attached
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.trial import Trial
from rdoq_onnx.system.summation import Compute, Sum, here

T = TypeVar("T")
Errors = tuple[NDArray[np.float64], NDArray[np.float64]]  # as `Judge.judged` returns them

_FIRST, _AHEAD = 2, 16  # trials judged together: first, and at most
WORTH = 1 << 25  # elements of a trial, of all samples; below, making its model takes longer than judging it
_ALL = 1 << 62  # bytes


def worth(allocation: Allocation, judge: Judge) -> bool:
    """Whether a trial takes longer to judge than to make, so that others can help."""
    return len(judge.samples) * sum(allocation.measurement.observation.sizes.values()) >= WORTH


def judged(proposals: Iterable[tuple[T, Allocation]], judge: Judge, compute: Compute) -> Iterator[tuple[T, Trial]]:
    """Yield each of `proposals`, judged by `compute`, in order."""
    if compute is here:
        yield from ((key, Trial.of(allocation, judge)) for key, allocation in proposals)
        return
    remaining = iter(proposals)
    work = _Judging(replace(judge, samples=judge.samples.loaded(_ALL)))
    ahead = _FIRST
    while group := list(islice(remaining, ahead)):
        models = [_Model(allocation) for _, allocation in group]
        errors = _in_order(compute(Sum("trials", (work,), [(0, m) for m in models]), range(len(models))))
        for (key, allocation), each, found in zip(group, models, errors, strict=True):
            yield key, Trial(allocation, each.model, *found)
        ahead = min(2 * ahead, _AHEAD)


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results, which come with their index, in order."""
    early: dict[int, Any] = {}
    following = 0
    for index, value in results:
        early[index] = value
        while following in early:
            yield early.pop(following)
            following += 1


@dataclass(frozen=True)
class _Judging:
    """The errors of quantized models."""

    judge: Judge

    def loaded(self) -> Callable[[onnx.ModelProto], Errors]:
        return self.judge.judged


@dataclass(frozen=True)
class _Model:
    """A quantized model to judge, made when a process is about to take it: others judge meanwhile."""

    allocation: Allocation

    def __len__(self) -> int:
        return 1

    @cached_property
    def model(self) -> onnx.ModelProto:
        return quantized_model(self.allocation)

    def loaded(self) -> onnx.ModelProto:
        return attached(self.model)
