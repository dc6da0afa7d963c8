"""Threads for numpy: one task a layer on each core, and one BLAS thread in each task.

BLAS's own threads wait for one another by spinning; beside ONNX Runtime's threads on a busy machine that makes small
products 30 times slower. Tasks write to memory of their own, so that results do not depend on their order.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from threadpoolctl import threadpool_limits

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """A pool of so many threads."""

    pool: ThreadPoolExecutor
    threads: int

    @overload
    def map(self, function: Callable[[T], R], items: Iterable[T], /) -> list[R]: ...
    @overload
    def map(self, function: Callable[[T, S], R], items: Iterable[T], others: Iterable[S], /) -> list[R]: ...

    def map(self, function: Callable[..., R], *items: Iterable[Any]) -> list[R]:
        """`function` of each item, or of each pair of items of two iterables, in order."""
        return list(self.pool.map(function, *items))


@contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """So many threads, 0 for one on each core that is ours; while they live, BLAS runs on one thread."""
    count = threads or cores()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        yield Workers(pool, count)


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
