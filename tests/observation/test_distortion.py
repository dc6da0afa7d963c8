"""The unit of every measurement: Eq. 7 and 8 by hand."""

import numpy as np
import pytest

from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.observation.distortion import metric_of, sqnr_db
from rdoq_onnx.observation.parts import Part, Piece, whole


def metric_from(names, batches, samples):
    named = [(len(values[0]), dict(zip(names, values, strict=True))) for values in batches]
    return metric_of(whole(names), named, samples)


def outputs(rng, *shapes, dtype=np.float32):
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def test_one_output_is_the_mean_squared_error():
    rng = np.random.default_rng(0)
    reference, changed = outputs(rng, (6, 3, 2), (6, 3, 2))
    metric = metric_from(["y"], [[reference]], 6)
    assert (metric.outputs, metric.weights, metric.elements) == (("y",), (1.0,), 6)
    assert metric.power == pytest.approx(np.mean(reference**2), rel=1e-6)
    by_hand = ((changed - reference) ** 2).reshape(6, -1).mean(axis=1)
    np.testing.assert_allclose(metric.errors([changed], [reference], 6), by_hand, rtol=1e-6)


def test_parts_weigh_the_same_whatever_their_size_and_unit():
    rng = np.random.default_rng(1)
    small, large = outputs(rng, (4, 5), (4, 3000))
    metric = metric_from(["a", "b"], [[small, 100 * large]], 4)
    assert metric.elements == 3005
    assert metric.power == pytest.approx(1)
    noise = outputs(rng, (4, 5), (4, 3000))
    values, reference = [small + noise[0], 100 * (large + noise[1])], [small, 100 * large]
    got = metric.part_errors(values, reference, 4)
    by_hand = [(n**2).sum(axis=1) / (r**2).sum() * 4 / 2 for n, r in zip(noise, (small, large), strict=True)]
    np.testing.assert_allclose(got.T, by_hand, rtol=1e-3)
    np.testing.assert_allclose(metric.errors(values, reference, 4), np.sum(by_hand, axis=0), rtol=1e-3)
    for k in range(2):
        alone = metric.of_part(k)
        np.testing.assert_allclose(alone.errors(values[k : k + 1], reference[k : k + 1], 4), got[:, k])


def test_the_tensors_of_a_part_share_its_weight():
    rng = np.random.default_rng(1)
    logits, key, value = outputs(rng, (4, 5), (4, 30), (4, 70))
    parts = (*whole(["logits"]), Part("caches", tuple(Piece(n, n, n, "whole") for n in ("key", "value"))))
    metric = metric_of(parts, [(4, {"logits": logits, "key": key, "value": 9 * value})], 4)
    silent = [np.zeros_like(v) for v in (logits, key, value)]
    found = metric.part_errors(silent, [logits, key, 9 * value], 4).mean(axis=0)
    np.testing.assert_allclose(found, [0.5, 0.5], rtol=1e-6)


def test_a_silent_output_has_no_power_to_compare_with():
    assert metric_from(["y"], [[np.zeros((2, 3), np.float32)]], 2).power == 1


def test_batches_make_one_metric():
    rng = np.random.default_rng(2)
    a, b = outputs(rng, (7, 5), (7, 3))
    once = metric_from(["a", "b"], [[a, b]], 7)
    parts = metric_from(["a", "b"], [[a[:4], b[:4]], [a[4:], b[4:]]], 7)
    assert parts.elements == once.elements
    np.testing.assert_allclose(parts.weights, once.weights)


def test_only_floating_outputs_count():
    rng = np.random.default_rng(3)
    labels, scores = rng.integers(0, 9, (4, 1)), rng.standard_normal((4, 3)).astype(np.float32)
    metric = metric_from(["label", "score"], [[labels, scores]], 4)
    assert (metric.outputs, metric.weights, metric.elements) == (("score",), (1.0,), 3)
    with pytest.raises(CalibrationError, match="no floating-point output"):
        metric_from(["label"], [[labels]], 4)


def test_an_output_of_zeros_keeps_its_unit():
    metric = metric_from(["a", "b"], [[np.zeros((2, 3), np.float32), np.full((2, 3), 2, np.float32)]], 2)
    assert metric.weights == (1.0, pytest.approx(0.5))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite(value):
    with pytest.raises(CalibrationError, match="'y' of the float model is not finite"):
        metric_from(["y"], [[np.array([[1, value]], np.float32)]], 1)


def test_errors_are_summed_in_double_precision():
    reference = np.full((1, 4), 1e8, np.float32)
    metric = metric_from(["y"], [[reference]], 1)
    assert metric.errors([reference + 8], [reference], 1) == pytest.approx([64])


def test_decibels():
    assert sqnr_db(100, 1) == pytest.approx(20)
    assert sqnr_db(1, 2) == pytest.approx(-3.0103, abs=1e-4)
    assert sqnr_db(1, 0) == np.inf
    assert np.isfinite(sqnr_db(0, 1))


def test_samples_of_different_sizes_weigh_the_same():
    rng = np.random.default_rng(5)
    short, long = outputs(rng, (2, 3), (1, 12))
    metric = metric_from(["y"], [[short], [long]], 3)
    assert (metric.elements, metric.sizes) == (6, (6,))
    for value in (short, long):
        by_hand = np.square(value).mean(axis=1)
        np.testing.assert_allclose(metric.errors([0 * value], [value], len(value)), by_hand, rtol=1e-6)
    assert metric.power == pytest.approx((2 * np.mean(short**2) + np.mean(long**2)) / 3, rel=1e-6)


LOGITS = {
    "a language model": ((4, 6, 9), -1, True),
    "one position": ((4, 1, 9), -1, False),
    "a classifier": ((4, 9), -1, False),
    "a map of classes": ((4, 9, 6, 6), 1, False),
    "no logits": ((4, 6, 9), None, False),
}


@pytest.mark.parametrize("kind", LOGITS)
def test_several_rows_along_the_last_axis_are_sequential(kind):
    shape, axis, expected = LOGITS[kind]
    part = Part("y", (Piece("y", "y", "y", "whole", axis),))
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    assert metric_of([part], [(4, {"y": values})], 4).sequential is expected
