"""Sums over blocks in this process: the works of the blocks, what is kept meanwhile, and what is resumed."""

from dataclasses import dataclass

import numpy as np

from rdoq_onnx.calibration.blocks import in_blocks
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.system.progress import Unfinished
from rdoq_onnx.system.summation import Sum, Summation
from rdoq_onnx.system.threads import workers

SAMPLES = Samples("test", {"x": np.arange(20.0)})


@dataclass(frozen=True)
class Squares:
    """The sum of all x², times a factor."""

    factor: float
    loads: list

    def loaded(self):
        self.loads.append(self.factor)
        return lambda block: sum(self.factor * np.square(feeds["x"]).sum() for _, feeds in block.batches())


class Kept(Unfinished):
    def __init__(self, value=None):
        self.values = [value]

    def get(self):
        return self.values[-1]

    def put(self, value):
        self.values.append(value)


def test_each_block_is_summed_by_its_work_which_is_loaded_once():
    loads, done, blocks = [], [], in_blocks(SAMPLES, 4)
    asked = Sum("a sum", [Squares(1.0, loads), Squares(2.0, loads)], [(k // 3, b) for k, b in enumerate(blocks)])
    with workers(1) as pool:
        total = pool.total(asked, done.append)
    assert total == np.square(np.arange(12)).sum() + 2 * np.square(np.arange(12, 20)).sum()
    assert loads == [1.0, 2.0]
    assert sum(done) == 20


def test_a_sum_is_resumed_only_of_the_same_blocks():
    kept, loads = Kept(), []
    asked = Sum.of("", Squares(1.0, loads), in_blocks(SAMPLES, 4))
    total = Summation().total(asked, lambda n: None, kept)
    assert len(kept.values) == 6
    done = []
    again = Kept(kept.values[3])
    assert Summation().total(asked, done.append, again) == total
    assert len(again.values) == 3
    assert done == [12, 4, 4]
    other = Sum.of("", Squares(1.0, loads), in_blocks(SAMPLES, 5))
    again = Kept(kept.values[3])
    assert Summation().total(other, done.append, again) == total
    assert len(again.values) == 5


def test_only_sums_with_a_name_are_computed_elsewhere():
    class Elsewhere:
        def total(self, asked, advance, unfinished):
            return asked.name

    work = Squares(1.0, [])
    with workers(1, Elsewhere()) as pool:
        assert pool.total(Sum.of("far", work, in_blocks(SAMPLES, 4)), lambda n: None) == "far"
        assert pool.total(Sum.of("", work, in_blocks(SAMPLES, 4)), lambda n: None) == np.square(np.arange(20)).sum()
