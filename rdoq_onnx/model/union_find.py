"""Disjoint sets of numbered elements: union-find (Galler & Fischer, CACM 1964) with path halving."""

import numpy as np
from numpy.typing import NDArray

Elements = NDArray[np.int64]


class UnionFind:
    """Elements 0, 1, 2, ..., each in its own set until sets are united.

    A set is identified by its root. There is no union by rank: a union takes the root of its second set, so that roots
    depend only on the order of unions.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []

    def new(self, count: int) -> Elements:
        """Add `count` elements and return them, [count]."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        return np.arange(first, first + count)

    def find(self, element: int) -> int:
        """The root of the element's set."""
        parent = self._parent
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    def roots(self, elements: Elements) -> Elements:
        """Apply `find` to each element; the result has the same length."""
        return np.array([self.find(e) for e in elements.tolist()], np.int64)

    def unite(self, first: int, second: int) -> None:
        self._parent[self.find(first)] = self.find(second)

    def unite_all(self, first: Elements, second: Elements) -> None:
        """Unite elementwise; both arrays have the same length."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self.unite(a, b)
