"""Tuning within a run: by effort, within --minutes, kept with the curves, never worse."""

import re
from dataclasses import replace

import pytest

from rdoq_onnx import pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.errors import ModelError
from rdoq_onnx.refinement import joint_tuning
from rdoq_onnx.refinement.joint_tuning import TUNING, number_of_steps
from rdoq_onnx.system.progress import Progress
from tests.conftest import ROOT

MODEL, CALIBRATION = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"
CONFIG = Config(samples=60, weight_bits=2, activation_bits=3, effort="best", threads=1)


class Notes(Progress):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(joint_tuning, "default_steps", lambda network, observation: 32)


def run(config=CONFIG, curves=None):
    progress = Notes()
    return pipeline.run(MODEL, CALIBRATION, config, progress, curves), progress


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("curves") / "curves.npz"


def test_best_tunes_and_says_what_it_gains(kept):
    result, progress = run(curves=kept)
    *_, step = result.report.steps
    assert step.name == TUNING
    assert step.after <= step.before
    assert step.tried > 0
    assert "tuning: 32 steps" in progress.notes


def test_other_efforts_do_not(kept):
    result, _ = run(replace(CONFIG, effort="default"))
    assert all(step.name != TUNING for step in result.report.steps)


def test_a_second_run_gives_the_same_bytes_without_another_step(kept, monkeypatch):
    first, _ = run(curves=kept)
    monkeypatch.setattr(joint_tuning.Trainer, "step", lambda *_: pytest.fail("a step was taken again"))
    again, _ = run(curves=kept)
    assert again.model.SerializeToString() == first.model.SerializeToString()


def test_minutes_become_steps(monkeypatch, digits_allocation):
    allocation, samples, runtime = digits_allocation
    steps = Steps(Store(), Progress(), "x")
    config = replace(CONFIG, minutes=1.0)
    few, more = (number_of_steps(allocation, samples, replace(config, minutes=m), runtime, steps) for m in (0.05, 5.0))
    assert 0 < few < more
    steps.progress.seconds["observe"] = 1000.0
    assert number_of_steps(allocation, samples, config, runtime, steps) == 0


@pytest.fixture
def digits_allocation():
    result, _ = run(replace(CONFIG, effort="fast"))
    job = pipeline.Job.of(MODEL, CALIBRATION, CONFIG, Progress())
    return result.allocation, job.split.fitting, job.runtime


def test_the_number_of_steps_is_kept(tmp_path):
    config, curves = replace(CONFIG, minutes=0.3), tmp_path / "curves.npz"
    first, progress = run(config, curves)
    (note,) = (n for n in progress.notes if n.startswith("tuning"))
    assert re.fullmatch(r"tuning: [0-9]+ steps", note)
    again, progress = run(config, curves)
    assert note in progress.notes
    assert again.model.SerializeToString() == first.model.SerializeToString()


def test_an_error_leaves_the_refined_network(kept, monkeypatch):
    def refuse(*_):
        raise ModelError("no such kernel")

    monkeypatch.setattr(joint_tuning, "tuned", refuse)
    result, progress = run(curves=kept)
    assert "not tuned: no such kernel" in progress.notes
    assert all(step.name != TUNING for step in result.report.steps)
