"""The fewest bits that reach a goal: reached on the held-out samples, and slightly fewer bits would miss it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import pipeline
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.config import Config
from rdoq_onnx.errors import BudgetError, ConfigError
from rdoq_onnx.model.cost_rows import Amount, preset
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 12] x) => (float[N, 6] y) { [first] z = MatMul (x, w) [act] a = Tanh (z) [second] y = MatMul (a, v) }"""
CONFIG = Config(threads=1, effort="fast")


def model(text=TEXT):
    rng = np.random.default_rng(0)
    made = parser.parse_model(text)
    for name, shape in (("w", (12, 16)), ("v", (16, 6))):
        made.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return made


def run(config, text=TEXT, count=80):
    x = np.random.default_rng(1).standard_normal((count, 12)).astype(np.float32)
    return pipeline.run(model(text), {"x": x}, config, Progress())


@pytest.mark.parametrize("least", [15.0, 25.0])
def test_sqnr_is_reached_with_few_bits(least):
    report = run(replace(CONFIG, sqnr=least), count=120).report
    assert least <= report.parts[0].bound_db < least + 3
    assert report.sqnr_db > report.parts[0].bound_db
    assert report.weight_bits < 7
    assert report.activation_bits < 8


@pytest.mark.parametrize(("moved", "fixed"), [("weights", "activation_bits"), ("activations", "weight_bits")])
def test_only_one_budget_moves(moved, fixed):
    report = run(replace(CONFIG, sqnr=20.0, moved=moved, weight_bits=7.0, activation_bits=8.0)).report
    assert report.sqnr_db >= 20
    other = {"activation_bits": "weight_bits", "weight_bits": "activation_bits"}[fixed]
    assert getattr(report, other) < getattr(report, fixed)
    assert getattr(report, fixed) > 6


def test_the_least_cost_reaches_the_goal():
    """Fewer operations than the fewest bits take, and more than the greatest budget that misses."""
    cost = preset("bops")
    fewest = run(replace(CONFIG, sqnr=20.0), count=120)
    cheapest = run(replace(CONFIG, sqnr=20.0, cost=cost), count=120)
    assert cheapest.report.parts[0].bound_db >= 20
    spent = cheapest.report.cost.spent
    assert spent == Pricing(cheapest.allocation.measurement, cost).total(cheapest.allocation)
    assert spent < Pricing(fewest.allocation.measurement, cost).total(fewest.allocation)
    with pytest.raises(
        BudgetError, match=r"--sqnr 20 cannot be met: 9\.\d+ % of 8 bits everywhere give \d+\.\d+ dB on"
    ):
        run(replace(CONFIG, sqnr=20.0, cost=cost, budget=Amount(10, percent=True)), count=120)
    capped = run(replace(CONFIG, sqnr=20.0, cost=cost, budget=Amount(90, percent=True)), count=120)
    assert capped.report.parts[0].bound_db >= 20
    assert capped.report.cost.spent <= 0.9 * capped.report.cost.at_8_bits


def test_refinement_goes_on_to_fewer_bits():
    plain = run(replace(CONFIG, sqnr=20.0)).report
    refined = run(replace(CONFIG, sqnr=20.0, effort="default")).report
    assert refined.sqnr_db >= 20
    assert refined.weight_bits <= plain.weight_bits + 0.01


def test_agreement_is_reached():
    goals = (50.0, 80.0, 93.0)
    bits = [run(replace(CONFIG, top1_agreement=goal), count=1200).report.weight_bits for goal in goals]
    assert bits[0] < bits[1] < bits[2] < 7  # no more than each goal needs


def test_goals_out_of_reach_tell_what_is_in_reach():
    with pytest.raises(
        BudgetError, match=r"--sqnr 90 cannot be met: 8 bits give \d\d\.\d\d dB on 12 samples, which prove"
    ):
        run(replace(CONFIG, sqnr=90.0))
    with pytest.raises(BudgetError, match=r"--top1-agreement 70 cannot be met: 1 bits give .* % on 12 samples"):
        run(replace(CONFIG, top1_agreement=70.0, weight_bits=1.0, activation_bits=1.0))


def test_few_samples_prove_no_high_agreement():
    """0.05^(1/12) = 77.9 %; 299 samples without a miss prove 99 %."""
    message = (
        "--top1-agreement 99: 12 samples without a miss prove only 77.9 %; give 299 with --validation, or ask for less"
    )
    with pytest.raises(BudgetError, match=message):
        run(replace(CONFIG, top1_agreement=99.0))
    with pytest.raises(BudgetError, match="no number of samples proves it"):
        run(replace(CONFIG, top1_agreement=100.0))


def test_labels_give_accuracy():
    rng = np.random.default_rng(6)
    x, validation = (rng.standard_normal((n, 12)).astype(np.float32) for n in (60, 300))
    (scores,) = Runtime("cpu", 1).session(model(), "all").run({"x": validation})
    labels = np.where(np.arange(300) % 4, scores.argmax(axis=1), -1)
    config = replace(CONFIG, weight_bits=3.0)
    result = pipeline.run(model(), {"x": x}, config, Progress(), None, {"x": validation, "y": labels})
    (found,) = Runtime("cpu", 1).session(result.model, "all").run({"x": validation})
    accuracy = json.loads(result.report.to_json())["agreement"]["accuracy"]
    assert accuracy == pytest.approx({"float_percent": 75, "percent": 100 * (found.argmax(axis=1) == labels).mean()})
    assert ("accuracy", f"{accuracy['percent']:.1f} %; the float model has 75.0 %") in result.report.rows()
    unlabelled = pipeline.run(model(), {"x": x}, config, Progress(), None, {"x": validation})
    assert json.loads(unlabelled.report.to_json())["agreement"]["accuracy"] is None


def test_validation_samples_decide():
    """As many as are needed, beside few for calibration; what is found holds on others."""
    rng = np.random.default_rng(5)
    x, validation, fresh = (rng.standard_normal((n, 12)).astype(np.float32) for n in (60, 1000, 4000))
    config = replace(CONFIG, top1_agreement=90.0)
    result = pipeline.run(model(), {"x": x}, config, Progress(), None, {"x": validation})
    assert result.report.held_out == 500
    assert result.report.agreement.bound >= 0.9
    session, float_session = (Runtime("cpu", 1).session(m, "all") for m in (result.model, model()))
    kept = session.run({"x": fresh})[0].argmax(axis=1) == float_session.run({"x": fresh})[0].argmax(axis=1)
    assert kept.mean() >= 0.9


def test_agreement_needs_scores():
    deep = TEXT.replace("float[N, 6] y", "float[N, 6, 1] y").replace(
        "y = MatMul (a, v)", "u = MatMul (a, v) axes = Constant <value_ints = [2]> () y = Unsqueeze (u, axes)"
    )
    with pytest.raises(ConfigError, match=r"--top1-agreement: the model does not give one row of scores"):
        run(replace(CONFIG, top1_agreement=99.0), deep)


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        ({"sqnr": float("nan")}, "--sqnr nan: give a finite"),
        ({"top1_agreement": 101.0}, "--top1-agreement 101 is out of range"),
        ({"sqnr": 20.0, "top1_agreement": 99.0}, "exclude each other; give one"),
        ({"size": 100, "joint": True}, "--size is a budget for weights only"),
    ],
)
def test_goals_that_make_no_sense(goals, said):
    with pytest.raises(ConfigError, match=said):
        Config(**goals)
