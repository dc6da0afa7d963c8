"""Allocations to tune: of a convolutional network, a transformer, and a decoder of which only weights are quantized."""

from dataclasses import dataclass

import pytest

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.curves.measure import measure_network
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.system.progress import Progress
from tests.cases import RUNTIME
from tests.conftest import ROOT

MODELS = ROOT / "models"
CASES = {
    "digits_cnn": ("digits_calib", Config(samples=60, weight_bits=3, activation_bits=3, effort="fast")),
    "digits_vit": ("digits_calib", Config(samples=30, weight_bits=3, activation_bits=4, effort="fast")),
    "plays_decoder": ("plays_calib", Config(samples=12, weight_bits=3, activation_bits=None, effort="fast")),
}


@dataclass(frozen=True)
class Case:
    """An allocation, the samples it came from, and a judge of others."""

    allocation: Allocation
    split: SampleSplit
    judge: Judge

    @classmethod
    def of(cls, name: str) -> "Case":
        calibration, config = CASES[name]
        model = read_normalized(MODELS / f"{name}.onnx", products=config.activation_bits is not None)[1]
        split = SampleSplit.whole(samples_for(model, MODELS / f"{calibration}.npz", config), config.seed)
        steps = Steps(Store(), Progress(), name)
        measurement = measure_network(analyse(model, config.selection), config, split, RUNTIME, steps)
        judge = Judge.of(measurement, split.measuring, RUNTIME, steps)
        return cls(allocate_bits(measurement, config.budgets), split, judge)


@pytest.fixture(scope="session")
def digits():
    return Case.of("digits_cnn")


@pytest.fixture(scope="session", params=CASES)
def case(request):
    return Case.of(request.param)
