"""Curves of the divergence beside those of the squared error, and who gets them."""

import numpy as np
import onnx
import pytest

import rdoq_onnx
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measure import regime
from rdoq_onnx.model.cost_rows import Amount, preset
from rdoq_onnx.pipeline import Job
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.summation import here
from tests.conftest import ROOT

SAMPLES = 48


def measured(**settings):
    calibration = ROOT / "models" / "digits_calib.npz"
    return rdoq_onnx.measure(
        ROOT / "models" / "digits_cnn.onnx", calibration, samples=SAMPLES, effort="fast", **settings
    )


def test_curves_of_the_divergence_are_those_of_a_run_that_minimizes_it():
    both, own = measured(distortion="auto", widths=[4]), measured(distortion="kl", widths=[4])
    assert own.divergence is None
    assert own.observation.metric.name == "kl"
    rows = slice(0, both.channels)
    found = (both.divergence[rows] * both.curves.distortion[rows, 4]).sum()
    assert found == pytest.approx(own.curves.distortion[rows, 4].sum(), rel=0.5)  # of roundings that it did not choose
    assert np.isfinite(both.divergence).all()


def test_the_squared_error_alone_has_none():
    assert measured(distortion="mse").divergence is None


SIZE = preset("size")
LANGUAGE = {
    "few bits": ({"weight_bits": 3}, "kl"),
    "more bits": ({"weight_bits": 4}, "mse"),
    "few bits, squared error": ({"weight_bits": 3, "distortion": "mse"}, "mse"),
    "few bits, a cost reported": ({"weight_bits": 3, "cost": SIZE}, "kl"),
    "a cost": ({"weight_bits": 3, "cost": SIZE, "budget": Amount(40, percent=True)}, "mse"),
    "a size": ({"size": 100_000}, "mse"),
}


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_language_model_at_few_bits_minimizes_the_divergence(kind):
    settings, expected = LANGUAGE[kind]
    config = Config(samples=16, activation_bits=None, effort="fast", threads=1, **settings)
    models = ROOT / "models"
    job = Job.of(models / "plays_decoder.onnx", models / "plays_calib.npz", config, Progress())
    assert job.result(config).report.metric == expected


def test_budgets_of_another_metric_have_curves_of_their_own():
    few, more = Config(weight_bits=3), Config(weight_bits=4)
    models = {name: onnx.load(ROOT / "models" / f"{name}.onnx") for name in ("plays_decoder", "digits_cnn")}
    assert regime(few, models["plays_decoder"]) != regime(more, models["plays_decoder"])
    assert regime(few, models["digits_cnn"]) == regime(more, models["digits_cnn"])


def test_other_processes_help_with_it():
    config, asked = Config(samples=24, weight_bits=4, activation_bits=8, effort="fast", threads=1), []

    def compute(wanted, indices):
        asked.append(wanted.name)
        return here(wanted, indices)

    models = ROOT / "models"
    job = Job.of(models / "digits_cnn.onnx", models / "digits_calib.npz", config, Progress()).computed_by(compute)
    job.result(config)
    assert "divergence" in asked
