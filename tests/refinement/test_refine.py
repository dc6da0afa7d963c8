"""Refinement: no step makes it worse, budgets hold, fitted lines fit."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import pipeline
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.curves.measure import measure_network
from rdoq_onnx.curves.measurement import option_curves
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.refinement.affine_correction import Fitting, _line, _lines, fitted_layers, refitted
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.plan import Plan
from rdoq_onnx.refinement.refine import Refinement
from rdoq_onnx.refinement.reround import remeasured, rerounded
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.threads import workers
from tests.cases import RUNTIME, ignore
from tests.conftest import ROOT

MODELS = ROOT / "models"
CONFIG = Config(samples=60, weight_bits=3, activation_bits=3, effort="default")


class Digits:
    def __init__(self, config=CONFIG):
        self.model = read_normalized(MODELS / "digits_cnn.onnx")[1]
        self.samples = samples_for(self.model, MODELS / "digits_calib.npz", config)
        self.split = SampleSplit.whole(self.samples, config.seed)
        steps = Steps(Store(), Progress(), "digits")
        self.measurement = measure_network(analyse(self.model, config.selection), config, self.split, RUNTIME, steps)
        self.fitting, self.measuring = self.split.fitting, self.split.measuring
        self.judge = Judge.of(self.measurement, self.measuring, RUNTIME, steps)
        self.allocation = allocate_bits(self.measurement, config.budgets)

    def plan(self, effort):
        return Plan.of(effort, self.allocation, len(self.measuring))

    def refine(self, allocation, config, advance=ignore):
        plan = self.plan(config.effort)
        with workers(2) as pool:
            return Refinement(config, plan, self.judge, self.split, pool, advance).of(allocation)

    def refitted(self, allocation, chosen):
        with workers(2) as pool:
            return refitted(allocation, quantized_model(allocation), chosen, Fitting(self.fitting, RUNTIME, pool))


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def blocked():
    """Weights alone, with a scale for every 16 of them where 16 divides a channel."""
    return Digits(Config(samples=24, weight_bits=4, activation_bits=None, block_size=(16,)))


def test_scales_of_blocks_are_refitted_together(blocked):
    layers = blocked.allocation.measurement.layers
    k = next(k for k in fitted_layers(blocked.allocation, 1.0) if layers[k].block)
    found = blocked.refitted(blocked.allocation, [k]).measurement.layers[k]
    before, after = (x.codes[4] for x in (layers[k], found))
    assert before.scales.shape == after.scales.shape
    ratio = after.scales / before.scales
    np.testing.assert_allclose(ratio, np.broadcast_to(np.median(ratio, axis=1, keepdims=True), ratio.shape), rtol=2e-3)
    np.testing.assert_array_equal(after.scales, after.scales.astype(np.float16))


def test_rounding_and_measuring_again_keep_the_blocks(blocked):
    sizes = [x.block for x in blocked.allocation.measurement.layers]
    assert 16 in sizes
    with workers(2) as pool:
        found = rerounded(blocked.allocation, np.arange(len(sizes)), blocked.fitting, RUNTIME, pool)
        again = remeasured(found, 0, blocked.measuring, RUNTIME, pool)
    for measurement in (found.measurement, again):
        assert [x.block for x in measurement.layers] == sizes
        assert all((x.codes[4].scales.ndim == 2) == (x.block > 0) for x in measurement.layers)
        np.testing.assert_array_equal(measurement.curves.overhead, blocked.measurement.curves.overhead)
    assert blocked.judge.distortion(found) < 2 * blocked.judge.distortion(blocked.allocation)


STEPS = {
    "fast": ["uniform"],
    "default": ["bit swaps", "uniform", "scale refit"],
    "best": ["re-rounding", "re-measuring", "bit swaps", "clipping", "uniform", "scale refit", "ridge"],
}


@pytest.mark.parametrize("effort", STEPS)
def test_no_step_makes_it_worse(digits, effort):
    config = Config(samples=60, weight_bits=3, activation_bits=3, effort=effort)
    refined = digits.refine(digits.allocation, config)
    found, steps = refined.allocation, refined.steps
    assert [s.name for s in steps] == STEPS[effort]
    distortion = digits.judge.distortion(digits.allocation)
    for step in steps:
        assert step.before == pytest.approx(distortion)
        assert step.after <= step.before
        distortion = step.after
    assert digits.judge.distortion(found) == pytest.approx(distortion)
    assert found.weight_average <= 3
    assert found.activation_average <= 3


def test_refinement_at_default_effort_gains(digits):
    steps = digits.refine(digits.allocation, CONFIG).steps
    assert steps[-1].after < 0.9 * steps[0].before


def test_ridge_regression_is_tried_at_default_effort_where_much_is_lost(digits):
    config = replace(CONFIG, weight_bits=2, activation_bits=2)
    refined = digits.refine(allocate_bits(digits.measurement, config.budgets), config)
    (step,) = (s for s in refined.steps if s.name == "ridge")
    assert step.after < step.before


def test_a_mixture_that_loses_to_uniform_widths_is_dropped(digits):
    """Curves turned upside down make the worst of mixtures."""
    rows = digits.measurement.curves.distortion
    finite = np.where(np.isfinite(rows), rows, 0.0)
    bad = allocate_bits(digits.measurement, CONFIG.budgets, 1 / np.maximum(finite.max(axis=1), 1e-12) ** 4)
    uniform = uniform_bits(digits.measurement, CONFIG.budgets)
    assert digits.judge.distortion(bad) > digits.judge.distortion(uniform)
    refined = digits.refine(bad, Config(samples=60, weight_bits=3, activation_bits=3, effort="fast"))
    found, steps = refined.allocation, refined.steps
    assert found.activation_bits == uniform.activation_bits
    assert all((a == b).all() for a, b in zip(found.layer_bits, uniform.layer_bits, strict=True))
    assert steps[-1].after == steps[-1].tried < steps[-1].before


def test_uniform_widths_are_uniform_and_keep_to_pins(digits):
    name = digits.measurement.network.layers[2].name
    config = Config(weight_bits=4.7, activation_bits=5, pins=((name, 6),))
    found = uniform_bits(digits.measurement, config.budgets)
    for layer, bits in zip(digits.measurement.network.layers, found.layer_bits, strict=True):
        assert set(bits.tolist()) == ({6} if layer.name == name else {4})
    kinds = [a.fusion for a in digits.measurement.network.activations]
    assert [b for b, fusion in zip(found.activation_bits, kinds, strict=True) if not fusion] == [5] * kinds.count(False)


def test_trials_are_an_upper_bound(digits):
    for effort in STEPS:
        config = Config(samples=60, weight_bits=3, activation_bits=3, effort=effort)
        done = []
        digits.refine(digits.allocation, config, done.append)
        assert sum(done) <= digits.plan(effort).trials


def test_an_expensive_network_gets_fewer_swaps(digits):
    plans = [Plan.of("best", digits.allocation, samples) for samples in (20, 20_000, 2_000_000)]
    swaps = [p.rounds * p.groups for p in plans]
    assert swaps[0] > swaps[1] > swaps[2] == 1
    assert {(p.portions, p.fits) for p in plans} == {(6, plans[0].fits)}


def test_fitting_again_changes_little(digits):
    """Fitted once, gains are 1 and the rest 0: fitting again on the same samples changes little."""
    every = fitted_layers(digits.allocation, 1.0)
    once = digits.refitted(digits.allocation, every)
    twice = digits.refitted(once, every)
    first, second, third = (
        next(iter(a.measurement.layers[3].codes.values())).scales for a in (digits.allocation, once, twice)
    )
    assert not np.allclose(first, second, rtol=1e-3)
    np.testing.assert_allclose(second, third, rtol=2e-2)
    first, second = once.measurement.layers[3].offset, twice.measurement.layers[3].offset
    # Integer kernels hold a bias in steps of activation scale times weight scale, which are coarse at 3 bits.
    np.testing.assert_allclose(first, second, atol=0.02)
    assert np.linalg.norm(first - second) < 0.3 * np.linalg.norm(first)


def test_the_first_layers_and_the_last_are_fitted(digits):
    def fitted(share):
        chosen = fitted_layers(digits.allocation, share)
        layers = digits.refitted(digits.allocation, chosen).measurement.layers
        return [k for k, layer in enumerate(layers) if layer.offset is not None]

    count = len(digits.allocation.layer_bits)
    assert fitted(0.0) == [count - 1]
    assert fitted(2 / count) == [0, 1, count - 1]
    assert fitted(1.0) == list(range(count))


def test_a_layer_with_no_constant_bias_to_move_is_not_fitted():
    """Its bias is computed or has a beta of 0, so the bias correction is in an Add behind it."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 16] x) => (float[N, 16] y) {
          p = Gemm (x, w) a = Relu (p) s = ReduceMean <axes = [1], keepdims = 1> (x)
          q = Gemm <beta = 2.0> (a, w_1, s) b = Relu (q) r = Gemm <beta = 0.0> (b, w_2, c) d = Relu (r)
          y = Gemm (d, w_3, c)
        }""")
    rng = np.random.default_rng(0)
    values = {"w": (16, 16), "w_1": (16, 16), "w_2": (16, 16), "w_3": (16, 16), "c": (16,)}
    for name, shape in values.items():
        value = rng.standard_normal(shape).astype(np.float32) / 4
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    config = Config(weight_bits=3, activation_bits=4)
    result = pipeline.run(model, {"x": rng.standard_normal((128, 16)).astype(np.float32)}, config, Progress())
    layers = result.allocation.measurement.network.layers
    assert len(layers) == 4
    assert [layers[k].name for k in fitted_layers(result.allocation, 1.0)] == [layers[0].name, layers[3].name]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_lines_do_not_depend_on_threads(threads):
    rng = np.random.default_rng(0)
    target, noise = (rng.standard_normal((5, 300)).astype(np.float32) for _ in range(2))
    with workers(threads) as pool:
        found = _lines(target, target + 0.3 * noise, pool)
    np.testing.assert_array_equal(found, _line(target, target + 0.3 * noise))


def test_a_clipped_outlier_does_not_dominate_the_fit():
    """One huge clipped value among others that are exact."""
    target = np.random.default_rng(0).standard_normal((1, 1000)).astype(np.float32)
    target[0, 7] = 500
    gain, rest = _line(target, np.minimum(target, 4))
    np.testing.assert_allclose([gain[0], rest[0]], [1, 0], atol=1e-5)


def test_rerounding_keeps_widths(digits):
    with workers(2) as pool:
        again = rerounded(digits.allocation, np.array([1, 4]), digits.fitting, RUNTIME, pool)
        around = remeasured(digits.allocation, CONFIG.seed, digits.measuring, RUNTIME, pool)
    assert again.layer_bits is digits.allocation.layer_bits
    same = [a is b for a, b in zip(again.measurement.layers, digits.measurement.layers, strict=True)]
    assert [k for k, s in enumerate(same) if not s] == [1, 4]
    assert np.isfinite(digits.judge.distortion(again))
    before, after = digits.measurement.curves.distortion, around.curves.distortion
    np.testing.assert_array_equal(np.isfinite(before), np.isfinite(after))
    assert not np.allclose(before[np.isfinite(before)], after[np.isfinite(after)])


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_a_tensor_joined_into_the_output_is_judged_behind_its_quantizer(effort):
    """The quantizer does the work of the Relu; what is joined is what it decodes."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 7] y)
        { a = MatMul (x, w) b = Relu (a) c = MatMul (b, v) d = Sigmoid (c) y = Concat <axis = 1> (b, d) }""")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 4)), ("v", (4, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    x = rng.standard_normal((64, 4)).astype(np.float32)
    result = pipeline.run(model, {"x": x}, Config(effort=effort, threads=1), Progress())
    producer = {o: n.op_type for n in result.model.graph.node for o in n.output}
    assert producer["b"] == "DequantizeLinear"
    assert result.report.sqnr_db > 30


def test_first_order_is_tried_where_curves_are_anchored(digits):
    """Anchored curves that mislead are dropped for first order; steps behind go on with those."""
    measurement = digits.measurement
    rows = measurement.curves.distortion
    unanchored = option_curves(measurement)
    wrong = np.where(np.isfinite(rows), 1 / np.maximum(rows, 1e-12), np.inf)
    misled = replace(measurement, curves=replace(measurement.curves, distortion=wrong), unanchored=unanchored)
    refined = digits.refine(allocate_bits(misled, CONFIG.budgets), CONFIG)
    step = refined.steps[0]
    assert step.name == "first order"
    assert step.after == pytest.approx(digits.judge.distortion(digits.allocation))
    np.testing.assert_array_equal(refined.allocation.measurement.curves.distortion, rows)
