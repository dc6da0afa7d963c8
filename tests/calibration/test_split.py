"""The split of a run: disjoint parts, all of them used, the same for one seed; few samples do for both."""

import numpy as np
import pytest

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import FEW_SAMPLES, FITTING, judging, split


def rows(samples):
    return samples.feeds(slice(None))["x"].tolist()


def numbered(count):
    return Samples("arrays", {"x": np.arange(count)})


@pytest.mark.parametrize("count", [2, 9, 300])
def test_fitting_and_measuring_share_no_sample(count):
    fitting, measuring = split(numbered(count), 5)
    assert sorted(rows(fitting) + rows(measuring)) == list(range(count))
    assert len(fitting) == np.clip(round(FITTING * count), 1, count - 1)
    assert rows(split(numbered(count), 5)[0]) == rows(fitting)


def test_a_single_sample_is_fitted_to_and_measured():
    samples = numbered(1)
    assert split(samples, 0) == (samples, samples)


def test_activations_are_judged_on_all_samples_where_they_are_few():
    few, many = numbered(3 * FEW_SAMPLES - 3), numbered(3 * FEW_SAMPLES)
    assert judging(few, 0) is few
    assert rows(judging(many, 0)) == rows(split(many, 0)[1])
