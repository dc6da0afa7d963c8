"""Batch sizes: as large as memory allows, halved when it runs out."""

from types import SimpleNamespace

import pytest

from rdoq_onnx.errors import ShortageError
from rdoq_onnx.gradients import batch_sizes
from rdoq_onnx.gradients.batch_sizes import forward_batch, reverse_batch, with_memory
from rdoq_onnx.observation.batching import Batching
from tests.gradients.test_sum_graph import HOST, InGraph, network


def test_batches_fill_the_memory_of_a_device(monkeypatch):
    case = network("y = Conv <pads = [1, 1, 1, 1]> (x, w)", (3, 8, 8), {"w": (4, 3, 3, 3)}, 12)
    assert sorted(case.seen.sizes.values()) == [3 * 64, 4 * 64]
    each = 12 * 7 * 64 + 8 * 27 * 64  # the tensors and their adjoints, the unfolded input twice

    def batch(samples, memory, of=forward_batch):
        monkeypatch.setattr(InGraph, "memory", lambda self: 112 * 4 * 27 + memory)  # the weights and their changes
        return of(case.network, case.seen, InGraph("cpu"), samples)

    assert batch(1000, 2 * 9 * each) == 8  # a power of two
    assert batch(100, 2 * 64 * each) == 50  # two equal batches rather than 64 and 36
    assert batch(5, 1 << 40) == 5
    assert batch(1000, 1) == 1
    assert batch(1000, 2 * 9 * each, reverse_batch) == 8
    assert forward_batch(case.network, case.seen, HOST, 1000) == case.batching.size
    monkeypatch.setattr(batch_sizes, "_ROWS", 3 * 5)
    assert batch(1000, 1 << 40) == 4


def tried(fitting, batch, stackable=True):
    """Return the batch sizes tried when `fitting` samples fit into memory, and the final one."""
    seen = SimpleNamespace(batching=Batching(batch, stackable))
    sizes = []

    def run(size):
        sizes.append(size)
        if size > fitting:
            raise ShortageError("no memory")
        return size

    return sizes, with_memory(run, batch, seen)


def test_a_batch_that_does_not_fit_is_halved():
    assert tried(11, 40) == ([40, 20, 10], 10)
    assert tried(1, 7) == ([7, 4, 2, 1], 1)


@pytest.mark.parametrize(("fitting", "batch", "stackable"), [(0, 4, True), (2, 4, False)])
def test_what_never_fits_is_a_shortage(fitting, batch, stackable):
    with pytest.raises(ShortageError):
        tried(fitting, batch, stackable)
