"""Sums in a fixed tree: the same bits for any order, any partition into processes, any restart."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.system.tree_sum import TreeSum, blocks_below, plus, tree_sum


def values(count, seed=0):
    """Return values whose sums depend on the order of summation."""
    rng = np.random.default_rng(seed)

    def array():
        return rng.standard_normal(7) * 10.0 ** rng.integers(-8, 9, 7)

    return [(k, {0: array(), 1: (array().astype(np.float32), None)}, "text", float(array()[0])) for k in range(count)]


def flat(value):
    return np.concatenate([value[1][0], value[1][1][0].astype(np.float64), [value[0], value[3]]]).tobytes()


@given(st.data(), st.integers(1, 40), st.integers(0, 9))
def test_any_order_and_any_partition_give_the_same_bits(data, count, seed):
    expected = tree_sum(count, enumerate(values(count, seed)))
    order = data.draw(st.permutations(range(count)))
    owner = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    parts, given_values = [TreeSum(count) for _ in range(5)], values(count, seed)
    for k in order:
        parts[owner[k]].add(given_values[k], k)
    nodes = [node for part in parts for node in part.nodes()]
    merged = TreeSum(count)
    for (level, index), value in data.draw(st.permutations(nodes)):
        merged.add(value, index, level)
    assert flat(merged.result()) == flat(expected)


def test_the_tree_is_that_of_the_indices():
    numbers = [1e16, 1.0, -1e16, 1.0, 3.0]
    assert tree_sum(5, enumerate(numbers)) == ((1e16 + 1.0) + (-1e16 + 1.0)) + 3.0
    assert tree_sum(5, enumerate(numbers)) != sum(numbers)


@given(st.integers(1, 70))
def test_blocks_in_order_leave_one_node_a_level(count):
    tree = TreeSum(count)
    for k in range(count):
        tree.add(np.ones(1), k)
        nodes = [node for node, _ in tree.nodes()]
        assert len(nodes) <= count.bit_length()
        assert sorted(b for n in nodes for b in blocks_below(n) if b < count) == list(range(k + 1))
    assert tree.result() == count


@given(st.integers(1, 33), st.integers(0, 33))
def test_a_sum_goes_on_from_its_nodes(count, done):
    first = TreeSum(count)
    for k, value in enumerate(values(count)[:done]):
        first.add(value, k)
    again = TreeSum(count)
    for (level, index), value in copy.deepcopy(list(first.nodes())):
        again.add(value, index, level)
    assert again.missing() == list(range(min(done, count), count))
    for k in again.missing():
        again.add(values(count)[k], k)
    assert flat(again.result()) == flat(tree_sum(count, enumerate(values(count))))


def test_a_sum_that_lacks_blocks_is_none():
    tree = TreeSum(3)
    tree.add(1, 1)
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        tree.result()


@given(st.integers(1, 33), st.integers(0, 9))
def test_what_waits_may_be_elsewhere(count, seed):
    def frozen(value):
        for array in (value[1][0], value[1][1][0]):
            array.flags.writeable = False
        return value

    tree = TreeSum(count, frozen)
    for k, value in enumerate(values(count, seed)):
        tree.add(value, k)
    assert flat(tree.result()) == flat(tree_sum(count, enumerate(values(count, seed))))


def test_keys_that_only_some_have_and_arrays_that_cannot_be_written():
    fixed = np.ones(2)
    fixed.flags.writeable = False
    found = plus({1: fixed, 2: 5}, {1: np.ones(2), 3: 7})
    assert list(found) == [1, 2, 3]
    assert found[1].tolist() == [2, 2]
    assert (found[2], found[3]) == (5, 7)
    assert fixed.tolist() == [1, 1]
