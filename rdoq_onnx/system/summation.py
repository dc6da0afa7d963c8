"""Sums over blocks of samples, and where they are computed: here, or by others.

A sum is given by what sums one block (`Work`) and by the blocks. They are added in a fixed tree (tree_sum.py), so that
a sum has the same bits whoever computes which block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.tree_sum import TreeSum


class Work(Protocol):
    """What sums one block. It may travel to another process, and so holds neither sessions nor samples."""

    def loaded(self) -> Callable[[Block], Any]:
        """Return the function from a block to its sum (see `TreeSum`), with what all blocks share, as a session."""


@dataclass(frozen=True)
class Sum:
    """A sum over `blocks`, each with the index of its work among `works`.

    name: of the sum among those of a measurement; without one, only this process computes it.
    """

    name: str
    works: Sequence[Work]
    blocks: Sequence[tuple[int, Block]]

    @classmethod
    def of(cls, name: str, work: Work, blocks: Sequence[Block]) -> "Sum":
        """Return a sum of which one work sums all blocks."""
        return cls(name, (work,), [(0, block) for block in blocks])


class Summation(Protocol):
    """Where sums are computed."""

    def total(self, asked: Sum, advance: Advance, unfinished: Unfinished) -> Any:
        """Return a sum, `advance(n)` after n more samples; unfinished: what is kept of it meanwhile."""


class Here:
    """All blocks in this process, one after another."""

    def total(self, asked: Sum, advance: Advance, unfinished: Unfinished) -> Any:
        """Return a sum, as a `Summation` does."""
        tree = resumed(asked, advance, unfinished)
        for index, value in computed(asked, tree.missing()):
            tree.add(value, index)
            unfinished.put(kept(asked, tree))
            advance(len(asked.blocks[index][1]))
        return tree.result()


def computed(asked: Sum, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Compute the sums of the blocks `indices` in this process; yield each with its index."""
    current, run = -1, None
    for index in indices:
        work, block = asked.blocks[index]
        if work != current or run is None:
            run = None  # its session frees its memory before the next one takes its own
            current, run = work, asked.works[work].loaded()
        yield index, run(block)


def resumed(asked: Sum, advance: Advance, unfinished: Unfinished) -> TreeSum:
    """Return what an earlier run summed of the same blocks."""
    tree, before = TreeSum(len(asked.blocks)), unfinished.get()
    if before is not None and before["firsts"] == _firsts(asked):
        for (level, index), value in before["nodes"]:
            tree.add(value, index, level)
    missing = set(tree.missing())
    advance(sum(len(block) for k, (_, block) in enumerate(asked.blocks) if k not in missing))
    return tree


def kept(asked: Sum, tree: TreeSum) -> dict[str, Any]:
    """Return what `resumed` goes on from, until more is added to the sum."""
    return {"firsts": _firsts(asked), "nodes": tuple(tree.nodes())}


def _firsts(asked: Sum) -> tuple[int, ...]:
    return tuple(block.first for _, block in asked.blocks)
