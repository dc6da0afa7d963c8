"""Bits diverted towards the divergence: where, and at what cost."""

import numpy as np
import pytest

import rdoq_onnx
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.config import Config
from rdoq_onnx.refinement.diversion import PREDICTED, diverted, predicted_divergence
from rdoq_onnx.refinement.trial import Trial, surely_diverted, tolerable
from tests.conftest import ROOT

CONFIG = Config(weight_bits=3, activation_bits=None, effort="fast")


@pytest.fixture(scope="module")
def measured():
    calibration = ROOT / "models" / "digits_calib.npz"
    return rdoq_onnx.measure(
        ROOT / "models" / "digits_vit.onnx", calibration, samples=48, effort="fast", weights_only=True
    )


def divergence_of(allocation):
    return predicted_divergence(allocation)


def test_the_predicted_divergence_falls_within_the_allowed_loss(measured):
    before = allocate_bits(measured, CONFIG.budgets)
    after, weigh = diverted(before, measured.divergence, CONFIG.budgets)
    assert divergence_of(after) < divergence_of(before)
    assert before.predicted <= after.predicted <= before.predicted * 10 ** (PREDICTED / 10)
    assert after.weight_average <= 3
    assert weigh.shape == after.bits.shape


def test_equal_curves_divert_nothing(measured):
    before = allocate_bits(measured, CONFIG.budgets)
    after, weigh = diverted(before, np.full(len(measured.divergence), 0.5), CONFIG.budgets)
    np.testing.assert_allclose(weigh, 1)
    assert (after.bits == before.bits).all()


def trial(allocation, error, divergence):
    errors, guarded = np.full((20, 1), error), np.full(20, divergence) + np.linspace(0, 1e-3, 20)
    return Trial(allocation, None, errors, guarded)


@pytest.mark.parametrize(
    ("error", "divergence", "kept"), [(1.05, 0.5, True), (1.2, 0.5, False), (1.0, 1.0, False), (0.9, 1.5, False)]
)
def test_a_diversion_is_kept_if_it_gains_surely_and_costs_little(measured, error, divergence, kept):
    allocation = allocate_bits(measured, CONFIG.budgets)
    gained = surely_diverted(trial(allocation, 1.0, 1.0), trial(allocation, error, divergence))
    assert (gained is not None) == kept
    if gained is not None:
        assert gained.after < gained.before
        assert gained.cost_db == pytest.approx(10 * np.log10(error))


def test_one_sample_does_not_raise_the_guard_beyond_noise():
    def trial(guarded):
        return Trial(None, None, np.ones((100, 1)), np.asarray(guarded, np.float64))  # type: ignore[arg-type]

    rng = np.random.default_rng(0)
    before = rng.random(100)
    one, all_of_them = before.copy(), before + 0.1
    one[3] += 20
    assert tolerable(trial(before), trial(before))
    assert tolerable(trial(before), trial(one))
    assert not tolerable(trial(before), trial(all_of_them))
