"""Hints for poor results: they can be followed, and following them gives the stated figures."""

import re
import shlex
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.config import Config
from rdoq_onnx.options import parse_pin
from rdoq_onnx.report.advice import advise
from rdoq_onnx.report.costs import cost_report
from tests.allocation import test_budget
from tests.allocation.test_costed import SIZES, percent

CONFIG = Config(weight_bits=3, activation_bits=4)


def measurement(seed: int = 0) -> Any:
    """Made-up curves of a network whose one output is one part."""
    whole = SimpleNamespace(metric=SimpleNamespace(parts=()))
    return replace(test_budget.measurement(seed), observation=whole)


def priced() -> Any:
    """The same, with the sizes that costs depend on."""
    whole = SimpleNamespace(metric=SimpleNamespace(parts=()), sizes=SIZES)
    return replace(test_budget.measurement(), observation=whole)


def report(**changed: Any) -> Any:
    """The figures that advice looks at, of a poor run."""
    figures = {"sqnr_db": 5.0, "measured": 0.0, "calibration": "calib.npz", "samples": 110, "held_out": 16}
    figures |= {"unsearched": 0.0, "likeness": None, "parts": (), "layers": (), "latency": ()}
    return SimpleNamespace(**figures | changed)


def followed(line: str, config: Config) -> Config:
    """`config` with the options that a line names."""
    pin = re.search(r"--pin (\S+|'[^']+') ", line)
    bits = {k: float(v) for k, v in re.findall(r"--(weight-bits|activation-bits|bits) ([\d.]+)", line)}
    pins = (parse_pin(shlex.split(pin[1])[0]),) if pin else ()
    both = bits.get("bits")
    return replace(
        config,
        pins=pins,
        weight_bits=bits.get("weight-bits", both or config.weight_bits),
        activation_bits=bits.get("activation-bits", both or config.activation_bits),
    )


def test_a_budget_of_a_cost_is_widened_in_its_unit() -> None:
    budgets = percent(12)
    allocation = allocate_bits(priced(), budgets)
    config = Config(cost=budgets.cost, budget=budgets.budget)
    poor = report(cost=cost_report(allocation, budgets), predicted=allocation.predicted)
    (line,) = advise(allocation, config, poor)
    found = re.fullmatch(r"--budget ([\d.]+)% leaves (\d+) % of the predicted distortion", line)
    assert found
    better = allocate_bits(allocation.measurement, percent(float(found[1]) + 0.01))
    assert 100 * better.predicted / allocation.predicted == pytest.approx(int(found[2]), abs=1)
    assert int(found[2]) <= 25


def test_a_good_result_needs_no_advice() -> None:
    allocation = allocate_bits(measurement(), CONFIG.budgets)
    assert advise(allocation, CONFIG, report(sqnr_db=20.0, measured=allocation.predicted)) == ()


@pytest.mark.parametrize("config", [CONFIG, Config(weight_bits=3, activation_bits=3, joint=True)])
@pytest.mark.parametrize("seed", range(4))
def test_advice_can_be_followed_and_does_what_it_says(config: Config, seed: int) -> None:
    allocation = allocate_bits(measurement(seed), config.budgets)
    (line,) = advise(allocation, config, report())
    share = re.search(r"leaves (\d+) %", line)
    assert share
    better = allocate_bits(allocation.measurement, followed(line, config).budgets)
    assert 100 * better.predicted / allocation.predicted == pytest.approx(int(share[1]), abs=0.6)
    assert better.predicted < allocation.predicted


def test_an_activation_in_the_way() -> None:
    found = measurement()
    distortion = found.curves.distortion.copy()
    distortion[13, 1:] = 1e3 * 4.0 ** -np.arange(1, 9)  # the input of the network: 48 of 176 elements
    elements = found.curves.elements.copy()
    elements[13] = 2
    poor = replace(found, curves=replace(found.curves, distortion=distortion, elements=elements))
    config = replace(CONFIG, pins=(("x", 2),))
    (line,) = advise(allocate_bits(poor, config.budgets), config, report())
    assert re.fullmatch(
        r"activation x, pinned to 2 bits, causes 100 % of the distortion: --pin x=[3-8] --activation-bits 4[.\d]* "
        r"costs \d\.\d % more bits and leaves \d+ % of the total",
        line,
    )


def test_curves_that_promise_too_much() -> None:
    allocation = allocate_bits(measurement(), CONFIG.budgets)
    off = report(sqnr_db=30.0, measured=4 * allocation.predicted, calibration="synthetic")
    lines = advise(allocation, CONFIG, off)
    assert lines[0] == "the samples are synthetic: give real ones with --calibration"
    fix = "use more --samples (110 now) or --effort best for more accurate curves"
    assert lines[1] == f"measured distortion is 4.0 times the predicted one: {fix}"
    good = report(sqnr_db=30.0, measured=allocation.predicted / 5)
    assert advise(allocation, CONFIG, good) == (f"predicted distortion is 5.0 times the measured one: {fix}",)
    assert "--measure probe" in advise(allocation, replace(CONFIG, effort="best"), off)[1]


def test_where_no_width_helps() -> None:
    config = Config(weight_bits=8, activation_bits=8)
    allocation = allocate_bits(measurement(), config.budgets)
    (line,) = advise(allocation, config, report())
    assert re.fullmatch(r"no wider width helps: --exclude \S+ leaves in float the layer that causes \d+ % .*", line)
