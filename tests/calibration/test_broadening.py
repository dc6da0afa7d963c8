"""Copies with other ids, where samples show few of a table's."""

import numpy as np

from rdoq_onnx.calibration.broadening import broadened, narrow_inputs
from rdoq_onnx.calibration.samples import Samples


def sentences(length: int = 6, count: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    ids = rng.integers(10, 400, (count, length))
    ids[:, 0], ids[:, -1] = 1, 2  # marks at both ends
    return {"ids": ids, "mask": np.ones_like(ids)}


def test_copies_keep_marks_and_other_inputs_and_replace_about_half():
    samples = Samples("test", sentences(60), others=(sentences(40),))
    found = broadened(samples, {"ids": 1000}, 0)
    assert len(found) == 2 * len(samples)
    before, after = samples.by_shape(), found.by_shape()
    assert len(after) == 4
    for own, copy in zip(before, after[2:], strict=True):
        ids, other = (part.feeds(slice(None)) for part in (own, copy))
        assert (ids["mask"] == other["mask"]).all()
        assert (other["ids"][:, [0, -1]] == [1, 2]).all()
        assert 0.2 < (ids["ids"] != other["ids"]).mean() < 0.6
        assert 0 <= other["ids"].min() <= other["ids"].max() < 1000
    again = broadened(samples, {"ids": 1000}, 0)
    assert again.digest == found.digest


def test_samples_that_show_most_ids_stay():
    many = Samples("test", sentences(60, 200))  # each of 390 ids about 30 times
    assert broadened(many, {"ids": 1000}, 0) is many
    samples = Samples("test", sentences(60))
    assert broadened(samples, {}, 0) is samples
    assert broadened(samples, {"other": 1000}, 0) is samples


def test_a_part_of_the_samples_is_copied_as_that_part():
    part = Samples("test", sentences(60)).take([3, 5])
    found = broadened(part, {"ids": 1000}, 0)
    assert len(found) == 4
    own = found.by_shape()[0].feeds(slice(None))["ids"]
    assert (own == part.feeds(slice(None))["ids"]).all()


def test_few_ids_are_those_that_occur_once():
    few, many = Samples("test", sentences(60)), Samples("test", sentences(60, 200))
    assert narrow_inputs(few, {"ids": 1000, "other": 10}) == {"ids": 1000}
    assert narrow_inputs(many, {"ids": 1000}) == {}
