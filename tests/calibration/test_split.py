"""The split of a run: disjoint parts that cover all samples, fixed by the seed; few samples serve several parts."""

import numpy as np
import pytest

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import FEW_SAMPLES, FITTING, SampleSplit


def rows(samples):
    return samples.feeds(slice(None))["x"].tolist()


def numbered(count):
    return Samples("arrays", {"x": np.arange(count)})


@pytest.mark.parametrize("count", [3, 9, 300])
def test_the_parts_share_no_sample(count):
    split = SampleSplit.of(numbered(count), 5)
    assert sorted(rows(split.seen) + rows(split.held_out)) == list(range(count))
    assert sorted(rows(split.fitting) + rows(split.measuring)) == sorted(rows(split.seen))
    seen = len(split.seen)
    assert len(split.fitting) == np.clip(round(FITTING * seen), 1, seen - 1)
    assert rows(SampleSplit.of(numbered(count), 5).fitting) == rows(split.fitting)


def test_a_single_sample_is_fitted_to_and_measured():
    samples = numbered(1)
    split = SampleSplit.whole(samples, 0)
    assert split.fitting == split.measuring == split.judging == samples
    assert len(split.held_out) == 0


def test_activations_are_judged_on_all_samples_where_they_are_few():
    few, many = numbered(3 * FEW_SAMPLES - 3), numbered(3 * FEW_SAMPLES)
    assert SampleSplit.whole(few, 0).judging is few
    split = SampleSplit.whole(many, 0)
    assert rows(split.judging) == rows(split.measuring)
