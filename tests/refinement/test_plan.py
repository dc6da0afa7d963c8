"""What an effort buys: as many trials as the bound on work allows, and none of a kind that is not asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.refinement.plan import EFFORTS


def plan(effort, work=10**6, units=100, activations=100, layers=100):
    return EFFORTS[effort].within(work, units, activations, layers)


def test_more_effort_is_more_trials():
    trials = [plan(effort).trials for effort in EFFORTS]
    assert trials == sorted(set(trials))
    assert trials[0] == 2  # the allocation, and uniform widths


@pytest.mark.parametrize("effort", EFFORTS)
@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_more_work_is_no_more_trials(effort, one, other):
    light, heavy = sorted((one, other))
    assert plan(effort, heavy).trials <= plan(effort, light).trials


@pytest.mark.parametrize("effort", EFFORTS)
def test_nothing_is_tried_of_what_a_network_lacks(effort):
    found = plan(effort, units=0, activations=0, layers=0)
    assert (found.groups, found.rounds, found.clips, found.alone) == (0, 0, 0, 0)


def test_no_more_is_tried_than_there_is():
    found = plan("best", units=3, activations=2, layers=1)
    assert (found.groups, found.clips, found.alone) == (3, 2, 1)
