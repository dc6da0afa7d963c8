"""Trials judged ahead of their turn: in order, no more than need be, with the outcome of one after another."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from rdoq_onnx.config import Config
from rdoq_onnx.refinement.lookahead import judged
from rdoq_onnx.refinement.plan import Plan
from rdoq_onnx.refinement.refine import Refinement
from rdoq_onnx.system.summation import Summation, here
from rdoq_onnx.system.threads import workers
from tests.refinement.test_refine import Digits

CONFIG = Config(samples=24, weight_bits=3, activation_bits=3, effort="best")
PLAN = Plan(portions=1, rounds=2, groups=6, patience=3, clips=3, fits=(1.0,), alone=3)


@pytest.fixture(scope="module")
def digits():
    return Digits(CONFIG)


def elsewhere(names):
    """Return what computes as other processes do, in reverse; it adds the name of each sum to `names`."""

    def compute(asked, indices):
        names.append(asked.name)
        work, *_ = copy.deepcopy(asked.works)
        run = work.loaded()
        for index in reversed(indices):
            yield index, run(copy.deepcopy(asked.blocks[index][1].loaded()))

    return compute


def refined(digits, compute):
    done = []
    with workers(2, Summation(compute)) as pool:
        found = Refinement(CONFIG, PLAN, digits.judge, digits.split, pool, done.append).of(digits.allocation)
    return found, sum(done)


def test_the_outcome_is_that_of_one_trial_after_another(digits, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.refinement.lookahead.WORTH", 0)
    monkeypatch.setattr("rdoq_onnx.refinement.best.SURE", 0.0)  # or hardly a trial among these few would be kept
    asked = []
    (found, tried), (expected, trials) = refined(digits, elsewhere(asked)), refined(digits, here)
    assert "trials" in asked
    assert found.steps == expected.steps
    assert tried == trials > len(expected.steps)
    assert {s.name for s in expected.steps if s.after < s.before} >= {"clipping", "scale refit"}
    assert found.model == expected.model


def test_trials_that_take_no_time_stay_in_this_process(digits):
    asked = []
    refined(digits, elsewhere(asked))
    assert asked
    assert "trials" not in asked


def test_results_are_in_order_and_no_more_is_proposed_than_is_judged_together(digits, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.refinement.lookahead._AHEAD", 3)
    proposed = []

    def proposals():
        for k in range(8):
            proposed.append(k)
            bits = tuple(np.full_like(b, k) for b in digits.allocation.layer_bits)
            yield k, replace(digits.allocation, layer_bits=bits)

    results = judged(proposals(), digits.judge, elsewhere([]))
    first = [next(results) for _ in range(4)]
    assert [key for key, _ in first] == [0, 1, 2, 3]
    assert proposed == [0, 1, 2, 3, 4]
    for key, trial in judged(proposals(), digits.judge, here):
        if key < len(first):
            np.testing.assert_array_equal(trial.errors, first[key][1].errors)
    assert first[0][1].distortion > first[3][1].distortion
