"""Threads for numpy: one task per layer, one core per task, one BLAS thread per task.

BLAS's own threads wait for each other by spinning. Next to ONNX Runtime's threads on a busy machine, that makes small
products 30 times slower. Tasks write to memory of their own, so that results do not depend on their order.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, overload

from threadpoolctl import threadpool_limits

from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.summation import Sum, Summation

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Workers:
    """A pool of `threads` threads, and where sums over samples are computed.

    Where it travels to, it becomes a pool of as many threads, which computes sums itself.
    """

    pool: ThreadPoolExecutor
    threads: int
    sums: Summation = field(default_factory=Summation)

    def __reduce__(self) -> tuple[Callable[[int], "Workers"], tuple[int]]:
        return _arrived, (self.threads,)

    def total(self, asked: Sum, advance: Advance, unfinished: Unfinished | None = None) -> Any:
        """Return a sum over blocks of samples, `advance(n)` after n more samples.

        unfinished: sums of an earlier run, which continues from there.
        """
        where = self.sums if asked.name else Summation()
        return where.total(asked, advance, unfinished or Unfinished())

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
def workers(threads: int, sums: Summation | None = None) -> Iterator[Workers]:
    """Start `threads` threads, 0 for one per usable core; BLAS is limited to one thread meanwhile.

    sums: where sums over samples are computed; None for here.
    """
    count = threads or cores()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        yield Workers(pool, count, sums or Summation())


@cache
def limit_blas() -> None:
    """Limit BLAS to one thread for as long as the process lives."""
    threadpool_limits(1, "blas")


@cache
def _arrived(threads: int) -> Workers:
    """Return the pool of a process that computes for another."""
    return Workers(ThreadPoolExecutor(threads), threads)


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
