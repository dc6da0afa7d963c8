"""The expected steps of a run that has begun: those that a dry run foresees, and never a reason to fail."""

import numpy as np

from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.estimate.dry_run import dry_run
from rdoq_onnx.estimate.expected import expected_seconds
from rdoq_onnx.observation.inputs import samples_for
from tests.cases import RUNTIME
from tests.conftest import ROOT

CNN, CALIBRATION = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"
CONFIG = Config(weight_bits=4, activation_bits=8, samples=16, threads=1)


def test_the_steps_are_those_of_a_dry_run():
    normal = read_normalized(CNN)[1]
    expected = expected_seconds(normal, samples_for(normal, CALIBRATION, CONFIG), CONFIG, RUNTIME)
    assert set(expected) == set(dry_run(CNN, CALIBRATION, CONFIG).seconds)
    assert all(seconds >= 0 for seconds in expected.values())
    assert sum(expected.values()) > 0


def test_what_cannot_be_foreseen_is_not_expected():
    normal = read_normalized(CNN)[1]
    wrong = Samples("wrong", {"input": np.zeros((4, 1, 3), np.float32)})
    assert expected_seconds(normal, wrong, CONFIG, RUNTIME) == {}
