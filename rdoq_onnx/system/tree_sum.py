"""Sums of blocks in a fixed binary tree: the same bits whatever order the blocks arrive in, and wherever they are from.

Floating-point addition is not associative, so that the order of a sum decides its last bits. Here it is that of a tree
over the blocks' indices:

    level 0    0   1   2   3   4        the blocks
    level 1    0+1     2+3     4        pairs; a node without a neighbour moves up as it is
    level 2    (0+1)+(2+3)     4
    level 3    ((0+1)+(2+3))+4

A node is added to its neighbour once both are there. Blocks that arrive in order leave at most one node a level.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Node = tuple[int, int]  # level and index


class TreeSum:
    """The sum of `count` values: numbers, arrays, or tuples and dicts of these, all of one structure.

    Arrays that are added belong to the sum afterwards. Keys that only some dicts have are summed over those. Of texts
    the first one stays. park: takes what waits for its neighbour, and returns it with read-only arrays elsewhere.
    """

    def __init__(self, count: int, park: Callable[[Any], Any] = lambda value: value) -> None:
        self._count, self._park = count, park
        self._nodes: dict[Node, Any] = {}

    def add(self, value: Any, index: int, level: int = 0) -> None:
        """Add the sum of a node: of the block `index`, or of all blocks below that node of a higher level."""
        node = (level, index)
        while self._size(node[0]) > 1:
            level, index = node
            neighbour = (level, index ^ 1)
            if neighbour[1] < self._size(level):
                if neighbour not in self._nodes:
                    self._nodes[node] = self._park(value)
                    return
                other = self._nodes.pop(neighbour)
                value = plus(other, value) if index % 2 else plus(value, other)
            node = (level + 1, index // 2)
        self._nodes[node] = value

    def nodes(self) -> Iterator[tuple[Node, Any]]:
        """Yield the nodes summed so far, in order; `add` takes them in any."""
        return iter(sorted(self._nodes.items(), key=lambda item: item[0]))

    def missing(self) -> list[int]:
        """Return the blocks that are not in the sum yet."""
        done = {k for node in self._nodes for k in blocks_below(node)}
        return [k for k in range(self._count) if k not in done]

    def result(self) -> Any:
        """Return the sum of all blocks."""
        if self.missing():
            raise ValueError(f"blocks {self.missing()} are not summed yet")
        (value,) = self._nodes.values()
        return value

    def _size(self, level: int) -> int:
        return -(-self._count // (1 << level))


def blocks_below(node: Node) -> range:
    """Return the blocks that a node sums, of a tree that may end before the last of them."""
    level, index = node
    return range(index << level, (index + 1) << level)


def plus(one: Any, other: Any) -> Any:
    """Add two values of the same structure; of two arrays one that can be written takes the sum."""
    if isinstance(one, dict):
        both = {k: plus(v, other[k]) if k in other else v for k, v in one.items()}
        return both | {k: v for k, v in other.items() if k not in one}
    if isinstance(one, tuple):
        return tuple(plus(a, b) for a, b in zip(one, other, strict=True))
    if one is None or isinstance(one, str):
        return one
    for total in (one, other):
        if isinstance(total, np.ndarray) and total.flags.writeable:
            return np.add(one, other, out=total)
    return one + other


def tree_sum(count: int, values: Iterable[tuple[int, Any]]) -> Any:
    """Sum `count` pairs of a block's index and its value, given in any order."""
    tree = TreeSum(count)
    for index, value in values:
        tree.add(value, index)
    return tree.result()
