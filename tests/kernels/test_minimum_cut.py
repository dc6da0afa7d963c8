"""A minimum cut, against all cuts of small random graphs."""

from itertools import chain, combinations

import numpy as np
import pytest

from rdoq_onnx.kernels.minimum_cut import source_side


def cost(capacities, side):
    return sum(c for (start, end), c in capacities.items() if start in side and end not in side)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_costs_less(seed):
    rng = np.random.default_rng(seed)
    names = ["s", "a", "b", "c", "d", "t"]
    pairs = [(i, j) for i in names for j in names if i != j and j != "s" and i != "t" and rng.random() < 0.6]
    capacities = {pair: float(rng.integers(0, 10)) for pair in pairs}
    inner = names[1:-1]
    cuts = chain.from_iterable(combinations(inner, n) for n in range(len(inner) + 1))
    least = min(cost(capacities, {"s", *cut}) for cut in cuts)
    side = source_side(capacities, "s", "t")
    assert "s" in side
    assert "t" not in side
    assert cost(capacities, side) == least


def test_without_edges_the_source_is_alone():
    assert source_side({}, "s", "t") == {"s"}
