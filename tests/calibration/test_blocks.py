"""Samples in blocks of whole batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.calibration.blocks import in_blocks
from rdoq_onnx.calibration.samples import Samples


def samples_of(shapes):
    """Return as many samples of 1, 2, ... columns as `shapes` says, numbered in their first column."""
    ends = np.cumsum([0, *shapes])
    first, *others = (
        {"x": np.full((n, k + 1), 0) + np.arange(e, e + n)[:, None]}
        for k, (n, e) in enumerate(zip(shapes, ends, strict=False))
    )
    return Samples("test", first, others=tuple(others))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 9))
def test_the_batches_of_all_blocks_are_those_of_the_samples(shapes, batch, most):
    samples = samples_of(shapes)
    found = in_blocks(samples, batch, 100, most)
    assert len(found) == min(most, len(samples.spans(batch)))
    batches = [feeds["x"] for block in found for _, feeds in block.loaded().batches()]
    expected = [feeds["x"] for _, feeds in samples.counted_batches(batch)]
    assert [b.tolist() for b in batches] == [e.tolist() for e in expected]
    assert [block.first for block in found] == [
        100 + int(np.sum([len(b) for b in found[:k]])) for k in range(len(found))
    ]
    counts = [-(-len(block) // batch) for block in found]
    if len(shapes) == 1:
        assert max(counts) - min(counts) <= 1


def test_no_samples_make_no_blocks():
    assert in_blocks(samples_of([4]).take(slice(0, 0)), 2) == []
