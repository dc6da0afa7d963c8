"""Timing in turns. No test asserts how long anything takes."""

import numpy as np
import pytest

from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import input_specs
from rdoq_onnx.system.io import read_model
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.turns import turns
from rdoq_onnx.verification.latency import latency_of, measure_latency
from tests.conftest import ROOT

PATH = ROOT / "models" / "digits_cnn.onnx"


def test_median_ratio_and_its_spread():
    taken = [(0.002, 0.001), (0.004, 0.002), (0.002, 0.0014), (0.002, 0.0012), (1.0, 0.6)]
    found = latency_of(taken, 8)
    assert (found.batch, found.float_ms, found.quantized_ms) == (8, 2.0, pytest.approx(1.4))
    assert (found.ratio, found.spread) == (pytest.approx(0.6), pytest.approx(0.05))


def test_turns_alternate_and_the_first_warms_up():
    calls = []
    taken = turns([lambda: calls.append("float"), lambda: calls.append("emitted")], 60.0)
    assert calls[:4] == ["float", "emitted", "emitted", "float"]
    assert len(calls) == 2 * (len(taken) + 1)


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
