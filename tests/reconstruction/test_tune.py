"""Tuning lowers the distortion, never raises it, and goes on where it stopped."""

from dataclasses import replace

import numpy as np
import pytest

from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.reconstruction.training import RATES, Recipe
from rdoq_onnx.reconstruction.tune import ROUNDS, Tuning, tuned
from rdoq_onnx.system.progress import Unfinished
from tests.cases import RUNTIME, ignore


class Memory(Unfinished):
    """Keeps all states; `stop` raises after so many."""

    def __init__(self, stop=None):
        self.states, self.stop = [], stop

    def get(self):
        return self.states[-1] if self.states else None

    def put(self, value):
        self.states.append(value)
        if len(self.states) == self.stop:
            raise KeyboardInterrupt


def tuning(case, kept=None, **changes):
    start = Tuning(case.split.fitting, RUNTIME, case.judge.distortion, 32, 0, ignore, kept or Memory())
    return replace(start, **changes)


def test_it_lowers_the_distortion_on_samples_it_has_not_seen(case):
    found = tuned(case.allocation, tuning(case))
    assert case.judge.distortion(found) < case.judge.distortion(case.allocation)


def test_without_a_gain_the_allocation_stays(digits):
    wild = Recipe(rates={**RATES, "codes": 10.0, "biases": 10.0})
    assert tuned(digits.allocation, tuning(digits, recipe=wild)) is digits.allocation


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_run_goes_on(digits, stop):
    whole = tuned(digits.allocation, tuning(digits))
    memory = Memory(stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(digits.allocation, tuning(digits, memory))
    memory.stop = None
    again = tuned(digits.allocation, tuning(digits, memory))
    assert quantized_model(again).SerializeToString() == quantized_model(whole).SerializeToString()


def test_what_is_kept_is_the_best(digits):
    memory, judged = Memory(), []

    def judge(allocation):
        judged.append(digits.judge.distortion(allocation))
        return judged[-1]

    found = tuned(digits.allocation, tuning(digits, memory, judged=judge))
    assert memory.states[-1]["least"] == min(judged) == digits.judge.distortion(found)
    assert memory.states[-1]["round"] == ROUNDS
    assert "moments" not in memory.states[-1]


def test_progress_adds_up(digits):
    done = []
    plan = tuning(digits, advance=done.append)
    tuned(digits.allocation, plan)
    assert sum(done) == plan.steps


def test_fewer_steps_than_rounds(digits):
    found = tuned(digits.allocation, tuning(digits, steps=3))
    assert np.isfinite(digits.judge.distortion(found))
