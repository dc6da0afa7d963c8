"""More to do takes longer: samples, weights, effort. The speeds of this machine have no part in these tests."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.curves import large
from rdoq_onnx.estimate.forecast import foreseen
from rdoq_onnx.estimate.seconds import Estimate
from rdoq_onnx.estimate.speeds import Speeds, counted_passes, speeds, timed_passes
from rdoq_onnx.estimate.work import Work
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.system.runtime import Runtime
from tests.analysis.test_analyse import parse

SPEEDS = Speeds(2, 1e-3, 1e-2, 1e-11, 1e-9, 1e-10, 1e-10, 1e-8, 1e-7, 1e-7)
RUNTIME = Runtime("cpu", 1)
STEPS = {"normalize", "observe", "moments", "sensitivity", "candidates", "taylor", "second look"}
STEPS |= {"emit", "verify", "latency"}
OWN = {"equalize", "clipping", "doubtful"}  # of activations


def work(samples=64, width=64, **settings) -> Work:
    model = parse(
        "agraph (float[N, 16] x) => (float[N, 20] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }",
        w=(16, width),
        v=(width, 20),
    )
    config = Config(threads=1, **settings)
    data = {"x": np.random.default_rng(0).standard_normal((samples, 16), np.float32)}
    return foreseen(analyse(model, config.selection), samples_for(model, data, config), config, RUNTIME)[0]


def steps(**settings) -> dict[str, float]:
    return Estimate(work(**settings), SPEEDS).steps()


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"samples": 64}, {"samples": 256}),
        ({"width": 64}, {"width": 256}),
        ({"effort": "fast"}, {"effort": "default"}),
        ({"effort": "default"}, {"effort": "best"}),
        ({"activation_bits": None}, {"activation_bits": 8.0}),
        ({"widths": (4,)}, {}),
        ({}, {"measure": "probe"}),
    ],
)
def test_more_to_do_takes_longer(less, more):
    few, many = steps(**less), steps(**more)
    assert sum(few.values()) < sum(many.values()) < inf
    assert min(*few.values(), *many.values()) >= 0


def test_names_the_steps_of_a_run():
    assert set(steps(effort="fast")) == STEPS | OWN
    assert set(steps(effort="fast", activation_bits=None)) == STEPS
    assert set(steps()) == STEPS | OWN | {"ties"}
    assert set(steps(samples=16)) == STEPS | OWN | {"ties", "taylor, activations"}
    assert set(steps(measure="probe")) == STEPS - {"taylor"} | {"probe"} | OWN - {"clipping", "doubtful"}


def test_a_large_network_rounds_in_two_steps(monkeypatch):
    monkeypatch.setattr(large, "LARGE", 0)
    few, all_widths = steps(activation_bits=None), steps(activation_bits=None, sqnr=20.0)
    assert "rounding" in few
    assert few["candidates"] < all_widths["candidates"]


def test_tuning_takes_what_is_left_of_the_minutes():
    assert sum(steps(effort="best", minutes=10).values()) == pytest.approx(600)
    assert steps(effort="best", minutes=1e-6)["tuning"] == 0


@pytest.mark.parametrize("name", ["product", "element", "forward", "load", "nearest", "eigen", "factor"])
def test_a_slower_machine_takes_longer(monkeypatch, name):
    monkeypatch.setattr(large, "LARGE", 0)
    slow = replace(SPEEDS, **{name: 2 * getattr(SPEEDS, name)})
    assert sum(Estimate(work(), slow).steps().values()) > sum(Estimate(work(), SPEEDS).steps().values())


def test_speeds_are_those_of_work_that_is_done():
    found = work()
    samples = samples_for(found.network.model, {"x": np.ones((8, 16), np.float32)}, found.config)
    for passes in (timed_passes(found.network.model, samples, 4, RUNTIME), counted_passes(found, RUNTIME)):
        measured = speeds(found, *passes)
        assert all(value > 0 for value in vars(measured).values())


def test_counts_multiplications():
    layer = work(width=64).layers[0]
    assert (layer.weights, layer.inputs, layer.second, layer.positions) == (1024, 16, 256, 1)
    assert (layer.forward, layer.unfolded, layer.width) == (1024, 16, 16)
