"""Sums over blocks of samples, and where they are computed.

A sum is given by what sums one block (`Work`) and by the blocks. They are added in a fixed tree (tree_sum.py), so that
a sum has the same bits whoever computes which block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.tree_sum import TreeSum

T = TypeVar("T")


class Work(Protocol):
    """What sums one block. It may travel to another process, and so holds neither sessions nor samples."""

    def loaded(self) -> Callable[[Any], Any]:
        """Return the function from a block to its sum (see `TreeSum`), with what all blocks share, as a session."""


class Part(Protocol):
    """What a work is given: a block of samples, or anything else that a process can work on by itself."""

    def loaded(self) -> Any:
        """Return it with all that it needs in memory, so that it can travel."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Sum:
    """A sum over `blocks`, each with the index of its work among `works`.

    name: of the sum among those of a measurement; without one, only this process computes it.
    """

    name: str
    works: Sequence[Work]
    blocks: Sequence[tuple[int, Part]]

    @classmethod
    def of(cls, name: str, work: Work, blocks: Sequence[Block]) -> "Sum":
        """Return a sum of which one work sums all blocks."""
        return cls(name, (work,), [(0, block) for block in blocks])

    @property
    def firsts(self) -> tuple[int, ...]:
        """What tells the blocks of this sum from those of another: the number of samples before each."""
        return tuple(block.first for _, block in self.blocks if isinstance(block, Block))


# Computes the sums of some blocks, given by index; yields each with its index, in any order.
Compute = Callable[[Sum, Sequence[int]], Iterator[tuple[int, Any]]]


class StoppedError(Exception):
    """A shard has summed its own blocks and lacks those of others. It goes no further; this is no error of a run."""


def here(asked: Sum, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Compute the sums of the blocks `indices` in this process, one after another."""
    current, run = -1, None
    for index in indices:
        work, block = asked.blocks[index]
        if work != current or run is None:
            run = None  # its session frees its memory before the next one takes its own
            current, run = work, asked.works[work].loaded()
        yield index, run(block)


class Summation:
    """All blocks of a sum, as `compute` computes them. park: as in TreeSum."""

    shared = False  # whether others compute some blocks, in runs of their own

    def __init__(self, compute: Compute = here, park: Callable[[Any], Any] = lambda value: value) -> None:
        self.compute, self.park = compute, park

    def total(self, asked: Sum, advance: Advance, unfinished: Unfinished) -> Any:
        """Return a sum, `advance(n)` after n more samples; unfinished: what is kept of it meanwhile.

        Raises StoppedError if others have not computed their blocks yet.
        """
        tree = resumed(asked, unfinished.get(), advance, self.park)
        for index, value in self.compute(asked, tree.missing()):
            tree.add(value, index)
            unfinished.put(kept(asked, tree))
            advance(len(asked.blocks[index][1]))
        return tree.result()

    def settle(self) -> None:
        """Go on after the last sum that has a name. Raises StoppedError if nothing else is asked for."""


def every(tasks: Iterable[Callable[[], T]]) -> list[T]:
    """Run all tasks, of which none needs another. Raises the first StoppedError once all have run."""
    results, stopped = [], None
    for task in tasks:
        try:
            results.append(task())
        except StoppedError as error:
            stopped = stopped or error
    if stopped is not None:
        raise stopped
    return results


def resumed(asked: Sum, before: Any, advance: Advance, park: Callable[[Any], Any]) -> TreeSum:
    """Return what was summed `before` (see `kept`), if it was of the same blocks."""
    tree = TreeSum(len(asked.blocks), park)
    if before is not None and before["firsts"] == asked.firsts:
        for (level, index), value in before["nodes"]:
            tree.add(value, index, level)
    missing = set(tree.missing())
    advance(sum(len(block) for k, (_, block) in enumerate(asked.blocks) if k not in missing))
    return tree


def kept(asked: Sum, tree: TreeSum) -> dict[str, Any]:
    """Return what `resumed` goes on from, until more is added to the sum."""
    return {"firsts": asked.firsts, "nodes": tuple(tree.nodes())}
