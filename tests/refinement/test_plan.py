"""The plan of an effort: trials within the bound on work, and none of a kind that the effort excludes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.refinement.plan import EFFORTS


def plan(effort, work=10**6, units=100, activations=100, layers=100):
    return EFFORTS[effort].within(work, units, activations, layers)


def test_more_effort_is_more_trials():
    trials = [plan(effort).trials for effort in EFFORTS]
    assert trials == sorted(set(trials))
    assert trials[0] == 3  # the allocation, first order, and uniform widths


@pytest.mark.parametrize("effort", EFFORTS)
@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_more_work_never_means_more_trials(effort, one, other):
    light, heavy = sorted((one, other))
    assert plan(effort, heavy).trials <= plan(effort, light).trials


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_network_without_units_gets_no_trials(effort):
    limited = plan(effort, units=0, activations=0, layers=0)
    assert (limited.groups, limited.rounds, limited.clips, limited.alone) == (0, 0, 0, 0)


def test_trials_are_limited_to_the_units_of_the_network():
    limited = plan("best", units=3, activations=2, layers=1)
    assert (limited.groups, limited.clips, limited.alone) == (3, 2, 1)
