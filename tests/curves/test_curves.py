"""Curves reject invalid input; the hull equals one found by hand, unit by unit."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given

from rdoq_onnx.curves import curves as module
from rdoq_onnx.curves.curves import Curves, hull_slopes, lower_hull
from tests import strategies as own

INF = np.inf


def make(distortion, widths=None, elements=None):
    distortion = np.array(distortion, dtype=float)
    widths = np.arange(distortion.shape[1]) if widths is None else np.array(widths)
    elements = np.ones(len(distortion), int) if elements is None else np.array(elements)
    return Curves(widths, elements, distortion)


def naive_hull(rate, distortion):
    """Return the hull by definition: no chord between two other points passes below, no cheaper point is as good."""
    points = [k for k in range(len(rate)) if np.isfinite(distortion[k])]
    on_hull = np.zeros(len(rate), bool)
    for k in points:
        before = [i for i in points if i < k]
        after = [j for j in points if j > k]
        falling = all(distortion[i] > distortion[k] for i in before)
        below = any(
            distortion[k] * (rate[j] - rate[i])
            > distortion[i] * (rate[j] - rate[k]) + distortion[j] * (rate[k] - rate[i])
            for i in before
            for j in after
        )
        on_hull[k] = falling and not below
    return on_hull


@given(own.curves(max_units=8, max_widths=9))
def test_hull_against_the_definition(curves):
    expected = [naive_hull(r, d) for r, d in zip(curves.rate, curves.distortion, strict=True)]
    np.testing.assert_array_equal(lower_hull(curves), expected)


@given(own.curves(min_units=3, max_units=8))
def test_hull_does_not_depend_on_the_block_size(curves):
    with mock.patch.object(module, "BLOCK", 2):
        blocked = lower_hull(curves)
    np.testing.assert_array_equal(blocked, lower_hull(curves))


@given(own.curves(max_units=8, max_widths=9))
def test_slopes_never_rise_along_a_hull(curves):
    slopes = hull_slopes(curves.widths, curves.distortion.T)
    for column in slopes.T:
        vertices = column[column > 0]
        assert vertices[0] == INF
        assert (np.diff(vertices[1:]) <= 0).all()


def test_slopes_never_rise_between_points_in_line():
    """In line up to float rounding, hence a test of its own."""
    distortion = np.linspace(0.1, 3.0, 50)[:, None] * np.arange(8, -1, -1)
    slopes = hull_slopes(np.arange(9), distortion.T)
    for column in slopes.T:
        assert (np.diff(column[column > 0][1:]) <= 0).all()


@pytest.mark.parametrize(
    ("distortion", "hull"),
    [
        ([4, 2, 1], [1, 1, 1]),
        ([4, 3, 0], [1, 0, 1]),  # above the chord
        ([4, 2, 0], [1, 1, 1]),  # in line with it
        ([4, 1, 2], [1, 1, 0]),  # noise: the curve rises
        ([4, 1, 1], [1, 1, 0]),  # the cheapest of the best
        ([0, 0, 0], [1, 0, 0]),
        ([INF, 2, 1], [0, 1, 1]),
        ([INF, 2, INF], [0, 1, 0]),
        ([4, INF, 1], [1, 0, 1]),
    ],
)
def test_hull_by_hand(distortion, hull):
    np.testing.assert_array_equal(lower_hull(make([distortion])), [np.array(hull, bool)])


def test_rate_restrict_take():
    curves = make([[3, 2, 1], [6, 4, 2]], widths=[0, 2, 8], elements=[5, 7])
    np.testing.assert_array_equal(curves.rate, [[0, 10, 40], [0, 14, 56]])
    masked = curves.restrict(np.array([[True, False, True], [True, True, True]]))
    np.testing.assert_array_equal(masked.distortion, [[3, INF, 1], [6, 4, 2]])
    taken = curves.take(np.array([1, 0, 1]))
    np.testing.assert_array_equal(taken.distortion[:, 0], [6, 3, 6])
    np.testing.assert_array_equal(taken.elements, [7, 5, 7])


def test_no_units():
    assert lower_hull(make(np.zeros((0, 3)))).shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [0, 2, 2]}, "ascend"),
        ({"widths": [2, 1, 3]}, "ascend"),
        ({"widths": [-1, 1, 2]}, r"0\.\.16"),
        ({"widths": [1, 2, 17]}, r"0\.\.16"),
        ({"widths": [0.0, 1.0, 2.0]}, "int64"),
        ({"widths": [0, 1]}, "shape"),
        ({"elements": [3, 0]}, "unit 1"),
        ({"elements": [3.0, 1.0]}, "int64"),
        ({"elements": [3]}, "shape"),
        ({"distortion": [[1, 2, 3], [1, np.nan, 3]]}, "unit 1 at width index 1 is nan"),
        ({"distortion": [[1, 2, -3], [1, 2, 3]]}, "unit 0 at width index 2 is -3"),
        ({"distortion": [[1, 2, 3], [INF, INF, INF]]}, "unit 1 has no allowed width"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**({"distortion": [[3, 2, 1], [3, 2, 1]]} | arguments))


def test_refuses_other_dtypes_and_no_width():
    with pytest.raises(ValueError, match="float64"):
        Curves(np.arange(2), np.ones(1, int), np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="widths"):
        Curves(np.arange(0), np.ones(1, int), np.ones((1, 0)))


def test_restrict_refuses_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match="mask"):
        make([[2, 1]]).restrict(np.ones((1, 3), bool))
    with pytest.raises(ValueError, match="mask"):
        make([[2, 1]]).restrict(np.ones((1, 2)))
    with pytest.raises(ValueError, match="no allowed width"):
        make([[2, 1]]).restrict(np.zeros((1, 2), bool))
