"""What is told of a cost before measuring: the widths that scales are chosen for, and rows that do not fit."""

import numpy as np
import pytest

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.cost.early import priced, sizes_of
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import Amount, parse_cost, preset
from rdoq_onnx.system.runtime import Runtime
from tests.option_strategies import model_of

RUNTIME = Runtime("cpu", 1)
SAMPLES = Samples("made up", {"x": np.ones((4, 4), np.float32)})
NETWORK = analyse(model_of("two layers"), Config().selection)
WHOLE = 64 * (16 + 12)


def test_sizes():
    sizes = sizes_of(NETWORK, SAMPLES, RUNTIME)
    assert {sizes[u.output] for layer in NETWORK.layers for u in layer.uses} == {4, 3}


@pytest.mark.parametrize("budget", [Amount(25, percent=True), Amount(WHOLE / 4)])
def test_budgets_tell_typical_widths(budget):
    config = priced(NETWORK, Config(cost=preset("bops"), budget=budget), SAMPLES, RUNTIME)
    assert config.weight_bits == pytest.approx(2)
    assert config.activation_bits == pytest.approx(8 * 0.25**0.25)
    floats = priced(NETWORK, Config(cost=preset("bops"), budget=budget, activation_bits=None), SAMPLES, RUNTIME)
    assert floats.activation_bits is None


@pytest.mark.parametrize("cost", [None, preset("bops"), preset("measured")])
def test_without_a_budget_nothing_changes(cost):
    config = Config(cost=cost)
    assert priced(NETWORK, config, SAMPLES, RUNTIME) == config


def test_rows_that_do_not_fit_are_refused_before_measuring():
    rows = "layer,weight_bits,activation_bits,cost\nm3,8,8,1\n"
    with pytest.raises(ConfigError, match="layer 'm3' matches no layer or product; the nearest is 'm"):
        priced(NETWORK, Config(cost=parse_cost(rows, "t.csv")), SAMPLES, RUNTIME)
