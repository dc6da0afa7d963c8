"""Timing in turns. No test asserts how long anything takes."""

import time

import numpy as np
import pytest

from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import input_specs
from rdoq_onnx.report.wording import latency_rows
from rdoq_onnx.system.io import read_model
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.turns import Took, time_of, turns
from rdoq_onnx.verification.latency import latency_of, measure_latency
from tests.conftest import ROOT

PATH = ROOT / "models" / "digits_cnn.onnx"


def steady(*turns):
    """Turns in which the processor worked all the time."""
    return [[Took(seconds, seconds) for seconds in turn] for turn in turns]


def test_median_ratio_and_its_interval():
    found = latency_of(steady((2e-3, 1e-3), (4e-3, 2e-3), (2e-3, 1.4e-3), (2e-3, 1.2e-3), (1.0, 0.6)), 8, 0.0)
    assert (found.batch, found.float_ms, found.quantized_ms) == (8, 2.0, pytest.approx(1.4))
    assert (found.ratio, found.spread, found.busy) == (pytest.approx(0.6), pytest.approx(0.1), False)
    assert latency_rows([found]) == [("latency, batch of 8", "1.4 ms, 0.60 ± 0.10 times the float model's 2 ms")]


def test_other_work_on_the_machine_changes_nothing():
    """Most of the float model's runs, of 3 ms of work, are kept waiting for 12 ms."""
    taken = [[Took(15e-3 if k % 4 else 3e-3, 3e-3), Took(1.5e-3, 1.5e-3)] for k in range(15)]
    found = latency_of(taken, 1, 0.5)
    assert (found.ratio, found.spread, found.busy) == (pytest.approx(0.5), pytest.approx(0), True)
    assert (found.float_ms, found.quantized_ms) == (pytest.approx(3), pytest.approx(1.5))
    ((_, text),) = latency_rows([found])
    assert text.startswith(
        "1.5 ms, 0.50 ± 0.01 times the float model's 3 ms, of processor time, as other work takes 50 %"
    )
    assert latency_of(taken, 1, 0.05).ratio == pytest.approx(0.1)  # threads that run side by side count once


def test_the_spread_covers_the_median_in_19_of_20_cases():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        ratios = np.exp(rng.normal(0, 0.3, 15))
        found = latency_of(steady(*((1.0, r) for r in ratios)), 1, 0.0)
        ordered = np.sort(ratios)
        low, high = next(
            (ordered[k], ordered[-1 - k]) for k in range(8) if ordered[-1 - k] - ordered[k] <= 2 * found.spread + 1e-12
        )
        hits += bool(low <= 1 <= high)
    assert 0.93 < hits / 400 < 0.99


def test_a_single_turn_has_no_spread():
    found = latency_of(steady((1.0, 1.2)), 1, 0.0)
    assert found.spread is None
    assert not found.slower
    assert latency_of(steady((1.0, 1.5)), 1, 0.0).slower


def test_noise_is_not_slower():
    noisy = steady(*((1.0, r) for r in (0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4)))
    even = steady(*((1.0, r) for r in (1.07, 1.08, 1.09, 1.1, 1.11, 1.12, 1.13)))
    assert not latency_of(noisy, 1, 0.0).slower
    assert latency_of(even, 1, 0.0).slower


def test_turns_alternate_and_the_first_warms_up():
    calls = []
    taken = turns([lambda: calls.append("float"), lambda: calls.append("emitted")], 60.0)
    assert calls[:4] == ["float", "emitted", "emitted", "float"]
    assert len(calls) == 2 * (len(taken) + 1)


def test_a_call_that_waits_takes_no_processor_time():
    took = time_of(lambda: time.sleep(0.02))
    assert took.processor < took.wall


def test_a_slow_model_runs_once():
    calls = []
    taken = turns([lambda: calls.append(0), lambda: calls.append(1)], 0.0)
    assert (calls, len(taken)) == ([0, 1], 1)


@pytest.mark.parametrize(("batch", "sizes"), [(32, [1, 5]), (4, [1, 4]), (1, [1])])
def test_one_sample_and_the_batch_as_far_as_there_are_samples(batch, sizes):
    model = read_model(PATH)
    samples = load_samples({"input": np.zeros((5, 1, 28, 28), np.float32)}, input_specs(model), None)
    found = measure_latency(model, model, samples, batch, Runtime("cpu", 1))
    assert [x.batch for x in found] == sizes
    assert all(x.float_ms > 0 and x.quantized_ms > 0 for x in found)


def test_a_fixed_batch():
    model = read_model(PATH)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    samples = load_samples({"input": np.zeros((4, 1, 28, 28), np.float32)}, input_specs(model), None)
    assert [x.batch for x in measure_latency(model, model, samples, 2, Runtime("cpu", 1))] == [2]
