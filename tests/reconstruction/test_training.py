"""Steps lower the loss, and depend on the seed and their number alone."""

from dataclasses import replace

import numpy as np
import pytest

from rdoq_onnx.config import Config
from rdoq_onnx.reconstruction.training import RATES, Recipe, Trainer, _inside
from tests.analysis.test_analyse import find
from tests.analysis.test_residual_streams import STREAM
from tests.cases import RUNTIME


def trainer(case, recipe=None, seed=0):
    return Trainer.of(case.allocation, case.split.fitting, RUNTIME, recipe or Recipe(), seed)


def test_it_lowers_the_loss(case):
    tuned = trainer(case)
    assert all(part.reverse.missing == {} for part in tuned.parts)
    losses = [tuned.step(number, 60) for number in range(60)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])


@pytest.mark.parametrize("kind", RATES)
def test_only_kinds_with_a_rate_move(digits, kind):
    tuned = trainer(digits, Recipe(rates={kind: RATES[kind]}))
    before = tuned.variables.values()
    for number in range(3):
        tuned.step(number, 3)
    moved = {
        name
        for (name, array), value in zip(tuned.variables.arrays, before, strict=True)
        if not np.array_equal(array, value)
    }
    assert moved <= {kind}
    assert moved or kind == "zeros"  # all zero points of this network are 0


def test_few_steps_have_lower_rates():
    few, some, many = (Recipe().rate("codes", 20, steps) for steps in (50, 200, 2000))
    assert few < some < many <= RATES["codes"]
    assert Recipe().rate("codes", 0, 2000) < many
    assert Recipe().rate("codes", 1999, 2000) < 1e-3 * many


def test_small_batches_move_scales_less_than_integers(digits):
    tuned = trainer(digits)
    small = replace(tuned, parts=(replace(tuned.parts[0], batch=2),))
    ratios = {kind: small._rate(kind, 20, 200) / tuned._rate(kind, 20, 200) for kind in RATES}
    assert ratios["codes"] == pytest.approx((2 / tuned.batch) ** 0.5)
    assert ratios["scales"] == ratios["biases"] == ratios["steps"] == pytest.approx(2 / tuned.batch)


def test_tensors_inside_are_not_branches_of_one_another():
    network = find(STREAM, Config(activation_bits=4), w1=(4, 4, 1, 1), w2=(4, 4, 1, 1), w3=(4, 4, 1, 1))
    assert "a/quantized" in [a.tensor for a in network.activations]
    assert _inside(network) == ["a", "m", "b"]


def test_the_seed_decides(digits):
    def values(seed):
        tuned = trainer(digits, Recipe(moved=True), seed)
        for number in range(3):
            tuned.step(number, 3)
        return np.concatenate([v.ravel() for v in tuned.variables.values()])

    np.testing.assert_array_equal(values(1), values(1))
    assert (values(1) != values(2)).any()


def test_quantizers_are_left_out_at_random(digits):
    tuned = trainer(digits, Recipe(left_out=0.4))
    gates = np.array([[g[0] for g in tuned._gated(number).values()] for number in range(200)])
    assert 0.5 < gates.mean() < 0.7
    assert set(np.unique(gates)) == {0.0, 1.0}
    assert np.isfinite(tuned.step(0, 3))


def test_an_epoch_takes_each_sample_once(digits):
    tuned = trainer(digits)
    (part,) = tuned.parts
    steps = len(part.samples) // part.batch
    for epoch in range(2):
        chosen = np.concatenate([tuned._chosen(epoch * steps + k)[1] for k in range(steps)])
        assert len(chosen) == steps * part.batch == len(set(chosen.tolist()))


def test_rates_rise_and_fall():
    rates = [Recipe().rate("codes", step, 1000) for step in range(1000)]
    assert rates[0] < rates[10] < rates[30]
    assert rates[30] > rates[500] > rates[999] > 0
    assert max(rates) <= RATES["codes"]
