"""Disjoint sets: the root of a union is the root of its second set."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.model.union_find import UnionFind

COUNT = 12
PAIRS = st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), max_size=30)


def test_new_elements_are_numbered_on_and_alone():
    sets = UnionFind()
    assert (sets.new(2).tolist(), sets.new(0).tolist(), sets.new(3).tolist()) == ([0, 1], [], [2, 3, 4])
    assert sets.roots(np.arange(5)).tolist() == [0, 1, 2, 3, 4]


@given(PAIRS)
def test_sets_are_those_of_a_naive_relabelling(pairs):
    sets = UnionFind()
    sets.new(COUNT)
    roots = list(range(COUNT))
    for a, b in pairs:
        sets.unite(a, b)
        roots = [roots[b] if r == roots[a] else r for r in roots]
    assert sets.roots(np.arange(COUNT)).tolist() == roots


@given(PAIRS)
def test_unite_all_unites_one_by_one(pairs):
    one, all_at_once = UnionFind(), UnionFind()
    for sets in (one, all_at_once):
        sets.new(COUNT)
    for a, b in pairs:
        one.unite(a, b)
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    all_at_once.unite_all(first, second)
    assert one.roots(np.arange(COUNT)).tolist() == all_at_once.roots(np.arange(COUNT)).tolist()
