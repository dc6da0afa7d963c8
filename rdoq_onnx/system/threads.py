"""Threads for numpy: one task per layer, one core per task, one BLAS thread per task.

BLAS's own threads wait for each other by spinning. Next to ONNX Runtime's threads on a busy machine, that makes small
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
    """A pool of `threads` threads."""

    pool: ThreadPoolExecutor
    threads: int

    @overload
    def map(self, function: Callable[[T], R], items: Iterable[T], /) -> list[R]: ...
    @overload
    def map(self, function: Callable[[T, S], R], items: Iterable[T], others: Iterable[S], /) -> list[R]: ...

    def map(self, function: Callable[..., R], *items: Iterable[Any]) -> list[R]:
        """Apply `function` to each item, or to each pair of items of two iterables; results are in order."""
        return list(self.pool.map(function, *items))

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Like `map`, but yield each result as soon as it and those before it are there."""
        return self.pool.map(function, items)


class Alone:
    """No threads of its own: tasks run one after another in the caller's, such as a task of `Workers`."""

    threads = 1

    def map(self, function: Callable[..., R], *items: Iterable[Any]) -> list[R]:
        """Apply `function` as `Workers.map` does."""
        return list(map(function, *items))


@contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """Start `threads` threads, 0 for one per usable core; BLAS is limited to one thread meanwhile."""
    count = threads or cores()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        yield Workers(pool, count)


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
