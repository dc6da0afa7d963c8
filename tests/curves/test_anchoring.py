"""Whole layers measured exactly, and first-order curves anchored to them."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from scipy.stats import spearmanr

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.config import Config
from rdoq_onnx.curves import anchoring
from rdoq_onnx.curves.anchoring import WEIGHT_BITS, anchor
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.runtime import Runtime
from tests.cases import Case, ignore, measured_whole
from tests.conftest import ROOT
from tests.probing.test_probe import LAYERS, distance, network

RUNTIME = Runtime("cpu", 2)
COUNT = 6


def replaced(model, layer, code):
    """Return `model` with all weights of `layer` as decoded from `code`."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weight = next(t for t in changed.graph.initializer if t.name == layer.weight)
    weight.CopyFrom(numpy_helper.from_array(layer.linear.tensor(code.values), layer.weight))
    return changed


@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_layer_against_changed_weights(ort_run, kind):
    model, samples = network(np.random.default_rng(3), kind)
    case = Case(model, samples, widths=(0, 2, 5))
    (layer,) = case.network.layers
    codes = case.candidates.layers[0].variants[0]
    found = case.prober.whole_layer(layer, codes)
    expected = [distance(case.seen.metric, ort_run, model, samples, replaced(model, layer, c)) for c in codes]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_whole_layer_whose_bias_absorbs_the_mean():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, 6] y) { y = MatMul (x, w) }""")
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((5, 6), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    samples = {"x": rng.standard_normal((8, 5), np.float32) + 2}
    case = Case(model, samples, widths=(0, 2))
    codes, mean = case.candidates.layers[0].variants[0], case.candidates.layers[0].mean
    moved = [(samples["x"] - samples["x"].mean(axis=0)) @ (c.values.T - weight) for c in codes]
    expected = [np.square(m).mean() for m in moved]
    np.testing.assert_allclose(case.prober.whole_layer(case.network.layers[0], codes, mean), expected, rtol=1e-3)


def test_a_whole_layer_that_is_used_twice():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 6] x) => (float[N, 6] y) { a = MatMul (x, w) b = Tanh (x) c = MatMul (b, w) y = Add (a, c) }""")
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((6, 6), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    samples = {"x": rng.standard_normal((7, 6), np.float32)}
    case = Case(model, samples, widths=(0, 2, 5))
    codes = case.candidates.layers[0].variants[0]
    moved = [(samples["x"] + np.tanh(samples["x"])) @ (c.values.T - weight) for c in codes]
    found = case.prober.whole_layer(case.network.layers[0], codes)
    np.testing.assert_allclose(found, [np.square(m).mean() for m in moved], rtol=1e-3)


def test_stacking_widths_does_not_change_curves():
    model, samples = network(np.random.default_rng(5), "conv")
    stacked, alone = Case(model, samples), Case(model, samples, batching=Batching(1, False))
    assert stacked.batching.stackable
    arguments = stacked.network.layers[0], stacked.candidates.layers[0].variants[0]
    np.testing.assert_allclose(stacked.prober.whole_layer(*arguments), alone.prober.whole_layer(*arguments), rtol=1e-4)


@pytest.fixture(scope="module")
def digits():
    """Return (first-order measurement of the small CNN, prober on samples of the same data)."""
    config = Config(threads=2)
    model = read_normalized(ROOT / "models" / "digits_cnn.onnx")[1]
    samples = samples_for(model, ROOT / "models" / "digits_calib.npz", Config(samples=COUNT))
    measured = measured_whole(analyse(model, config.selection), config, samples)
    seen = measured.observation
    return measured, Prober(measured.network, samples, seen.metric, RUNTIME, seen.batching)


@pytest.fixture(scope="module")
def anchored(digits):
    done = []
    before = digits[0].curves.distortion.copy()
    result = anchor(digits[0], digits[1], digits[1], done.append)
    np.testing.assert_array_equal(digits[0].curves.distortion, before)  # the argument is not modified
    assert done == [0] + [1] * (len(result.network.layers) + len(result.network.activations))
    return result


def test_curves_of_a_layer_sum_up_to_its_exact_distortion(digits, anchored):
    measured, prober = digits
    ratios = []
    for each, rows in zip(measured.layers, measured.unit_rows(), strict=True):
        low = [b for b in each.codes if b <= WEIGHT_BITS]
        exact = prober.whole_layer(each.layer, [each.codes[b] for b in low], each.mean)
        ratios.append(exact / measured.curves.distortion[rows, low].sum(axis=0))
    kept = np.clip(ratios, 1 / anchoring._MAX_RATIO, anchoring._MAX_RATIO)
    assert (kept == ratios).mean() > 0.8
    # All channels of a layer are scaled by one factor, shrunk towards that of the other layers.
    for rows, factors in zip(measured.unit_rows(), anchoring.shrunk(kept, COUNT), strict=True):
        before, after = (m.curves.distortion[rows, : WEIGHT_BITS + 1] for m in (measured, anchored))
        np.testing.assert_allclose(after, factors * before, rtol=1e-6)


def test_ratios_of_few_samples_are_shrunk_towards_the_mean_of_the_layers():
    ratios = np.array([[1.0, 2.0, 0.5, 2.0], [4.0, 2.0, 1.5, np.nan], [np.nan, 2.0, 1.0, 1.0]])
    np.testing.assert_allclose(anchoring.shrunk(ratios, 10**9), np.where(np.isnan(ratios), 1.0, ratios), rtol=1e-6)
    few = anchoring.shrunk(ratios, 4)
    assert 1.0 < few[0, 0] < few[1, 0] < 4.0
    np.testing.assert_allclose(few[:, 1], 2.0)
    assert few[2, 0] == few[1, 3] == 1.0  # not anchored
    # At 3 bits layers hardly differ, so most of the spread on few samples is noise.
    assert few[0, 3] / few[2, 3] < 1.05
    np.testing.assert_array_equal(anchoring.shrunk(np.full((2, 4), np.nan), 4), 1.0)


def test_shrinkage_brings_ratios_of_few_samples_closer_to_the_truth():
    rng = np.random.default_rng(0)
    layers, samples = 200, 8
    truth = 1.5 * np.exp(rng.normal(size=(layers, 4)) * anchoring._SPREADS)
    noisy = truth * rng.chisquare(samples, (layers, 4)) / samples

    def error(ratios):
        return np.square(np.log(ratios / truth)).mean(axis=0)

    assert (error(anchoring.shrunk(noisy, samples)) < 0.9 * error(noisy)).all()
    assert error(anchoring.shrunk(noisy, samples)).sum() < 0.7 * error(np.full_like(noisy, 1.5)).sum()


def test_wide_weights_are_left_alone(digits, anchored):
    measured, _ = digits
    assert WEIGHT_BITS == 3
    rows = slice(0, measured.channels)
    np.testing.assert_array_equal(
        anchored.curves.distortion[rows, WEIGHT_BITS + 1 :], measured.curves.distortion[rows, WEIGHT_BITS + 1 :]
    )
    np.testing.assert_array_equal(anchored.curves.elements, measured.curves.elements)
    assert all(one is other for one, other in zip(anchored.layers, measured.layers, strict=True))
    assert anchored.activations is measured.activations


def test_activations_are_replaced(digits, anchored):
    measured, prober = digits
    rows = anchored.curves.distortion[measured.channels :]
    for each, row in zip(measured.activations, rows, strict=True):
        table = each.quantizers
        exact = prober.activation(each.activation, list(table.values()))
        np.testing.assert_allclose(row[list(table)], exact, rtol=1e-9)
        absent = [b for b in range(9) if b not in table]
        assert np.isinf(row[absent]).all()


def test_layers_that_were_measured_exactly_are_left_alone(digits):
    measured, prober = digits
    probed = replace(measured, probed={measured.network.layers[1].uses[0].output: "for a test"})
    again = anchor(probed, prober, prober, ignore)
    rows = measured.unit_rows()
    np.testing.assert_array_equal(again.curves.distortion[rows[1]], measured.curves.distortion[rows[1]])
    assert not np.array_equal(again.curves.distortion[rows[0]], measured.curves.distortion[rows[0]])


def test_channels_still_rank_as_exact_curves_do(digits, anchored):
    """At 0 and 1 bits, much of a layer's exact distortion is interaction between channels, so single channels may rank
    slightly worse; at 2 and 3 bits they rank as before.
    """
    measured, prober = digits
    exact = np.concatenate(
        [
            prober.layer(each.layer, [each.codes[b] for b in range(WEIGHT_BITS + 1)], each.mean)
            for each in measured.layers
        ]
    )
    low = slice(0, WEIGHT_BITS + 1)
    before, after = (m.curves.distortion[: measured.channels, low] for m in (measured, anchored))
    assert rank(after, exact) > 0.95
    assert rank(after[:, 2:], exact[:, 2:]) > rank(before[:, 2:], exact[:, 2:]) - 0.01


def rank(curves, exact):
    return spearmanr(curves.ravel(), exact.ravel()).statistic


@pytest.mark.parametrize(
    ("exact", "first_order", "expected"),
    [
        (3.0, [1.0, 1.0], 1.5),
        (0.5, [1.0, 1.0], 0.25),
        (100.0, [1.0, 1.0], 8.0),
        (0.0, [1.0, 1.0], 0.125),
        (5.0, [0.0, 0.0], 1.0),
        (0.0, [0.0, 0.0], 1.0),
    ],
)
def test_ratio_is_bounded(exact, first_order, expected):
    assert anchoring.ratio(exact, np.array(first_order)) == expected
