"""Curves of the divergence beside those of the squared error, and who gets them."""

import numpy as np
import pytest

import rdoq_onnx
from rdoq_onnx.config import Config
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


@pytest.mark.parametrize(("distortion", "expected"), [("auto", "kl"), ("mse", "mse")])
def test_a_language_model_has_curves_of_the_divergence_by_default(distortion, expected):
    models = ROOT / "models"
    found = rdoq_onnx.measure(
        models / "plays_decoder.onnx",
        models / "plays_calib.npz",
        samples=16,
        effort="fast",
        weights_only=True,
        distortion=distortion,
    )
    assert found.observation.metric.name == expected
    assert found.divergence is None


def test_other_processes_help_with_it():
    config, asked = Config(samples=24, weight_bits=4, activation_bits=8, effort="fast", threads=1), []

    def compute(wanted, indices):
        asked.append(wanted.name)
        return here(wanted, indices)

    models = ROOT / "models"
    job = Job.of(models / "digits_cnn.onnx", models / "digits_calib.npz", config, Progress()).computed_by(compute)
    job.result(config)
    assert "divergence" in asked
