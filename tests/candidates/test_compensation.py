"""Error-compensated rounding against its definition, a plain loop over columns, and rounding to nearest."""

import numpy as np
import pytest

from rdoq_onnx.candidates import compensation
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.model.codes import halved

DAMPING = 0.05


def covariances(rng, groups, inputs, samples):
    """Return covariances of correlated inputs."""
    result = []
    for _ in range(groups):
        x = rng.standard_normal((samples, inputs)) @ rng.standard_normal((inputs, inputs))
        result.append(np.cov(x.T, bias=True).reshape(inputs, inputs))
    return np.stack(result)


def problem(rng, groups=1, rows=6, inputs=12, samples=200, bits=3):
    """Return (covariance, weights, scales, low, high)."""
    weights = rng.standard_normal((groups, rows, inputs))
    low, high = np.full((2, groups, rows), [[[-(2.0 ** (bits - 1))]], [[2.0 ** (bits - 1) - 1]]])
    scales = np.abs(weights).max(axis=2) * rng.uniform(0.7, 1.1, (groups, rows)) / 2 ** (bits - 1)
    return covariances(rng, groups, inputs, samples), weights, scales, low, high


def damped(covariance, damping):
    """Return H of the module's equation."""
    return np.stack([c + damping * np.trace(c) / len(c) * np.eye(len(c)) for c in covariance])


def loss(hessian, weights, integers, scales):
    """(w - q s)ᵀ H (w - q s) of each row."""
    left = weights - integers * scales[..., None]
    return np.einsum("grk,gkl,grl->gr", left, hessian, left)


def nearest(weights, scales, low, high):
    return np.clip(np.rint(weights / scales[..., None]), low[..., None], high[..., None])


def column_by_column(hessian, weights, scale, low, high):
    """Round one row weight by weight, compensating each error by the best change of the rest."""
    left, integers = weights.copy(), np.zeros(len(weights))
    order = np.argsort(-np.diag(hessian), kind="stable")
    for k, index in enumerate(order):
        rest = order[k + 1 :]
        integers[index] = np.clip(np.rint(left[index] / scale), low, high)
        error = left[index] - integers[index] * scale
        # min over d of (error, d) H (error, d)ᵀ, weights still to be rounded alone may move.
        left[rest] += np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[rest, index]) * error
    return integers


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_the_error_is_that_of_the_equation(bits):
    rng = np.random.default_rng(bits)
    covariance, weights, scales, low, high = problem(rng, groups=3, inputs=40, bits=bits)
    integers, error = Compensator.of(covariance, DAMPING).round(weights, scales, low, high)
    assert (integers.dtype, error.dtype) == (np.int8, np.float64)
    expected = loss(damped(covariance, DAMPING), weights, integers, scales)
    np.testing.assert_allclose(error, expected, rtol=1e-6)


@pytest.mark.parametrize("inputs", [1, 5, 31, 32, 33, 64, 70])
def test_blocks_of_columns_do_not_change_the_result(inputs):
    """Shorter than a block, exactly one, just over, and several."""
    assert compensation._BLOCK == 32
    rng = np.random.default_rng(inputs)
    covariance, weights, scales, low, high = problem(rng, inputs=inputs, rows=4)
    integers, _ = Compensator.of(covariance, DAMPING).round(weights, scales, low, high)
    (hessian,) = damped(covariance, DAMPING)
    for row in range(4):
        expected = column_by_column(hessian, weights[0, row], scales[0, row], low[0, row], high[0, row])
        np.testing.assert_array_equal(integers[0, row], expected)


def test_independent_inputs_are_rounded_to_nearest():
    rng = np.random.default_rng(0)
    _, weights, scales, low, high = problem(rng, groups=2, inputs=50)
    covariance = np.stack([np.diag(rng.uniform(0.1, 5, 50)) for _ in range(2)])
    integers, _ = Compensator.of(covariance, DAMPING).round(weights, scales, low, high)
    np.testing.assert_array_equal(integers, nearest(weights, scales, low, high))


@pytest.mark.parametrize("samples", [4, 20, 200])
@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_nearest_on_average(bits, samples):
    """Rounding is greedy, so not better in every case, but clearly in the mean."""
    rng = np.random.default_rng(10 * bits + samples)
    ratios = []
    for _ in range(40):
        covariance, weights, scales, low, high = problem(rng, inputs=20, samples=samples, bits=bits)
        compensator = Compensator.of(covariance, DAMPING)
        _, error = compensator.round(weights, scales, low, high)
        plain = loss(compensator.hessian, weights, nearest(weights, scales, low, high), scales)
        ratios.append(error.sum() / plain.sum())
    assert np.mean(ratios) < 0.8


def test_groups_are_rounded_independently():
    rng = np.random.default_rng(1)
    covariance, weights, scales, low, high = problem(rng, groups=4, inputs=40)
    together = Compensator.of(covariance, DAMPING)
    integers, error = together.round(weights, scales, low, high)
    floor = np.full_like(scales, 1e-9)
    refitted = together.refit(weights, integers, scales, floor)
    for g in range(4):
        one = slice(g, g + 1)
        alone = Compensator.of(covariance[one], DAMPING)
        q, e = alone.round(weights[one], scales[one], low[one], high[one])
        np.testing.assert_array_equal(q, integers[one])
        np.testing.assert_allclose(e, error[one], rtol=1e-9)
        np.testing.assert_allclose(alone.refit(weights[one], q, scales[one], floor[one]), refitted[one], rtol=1e-9)


def dead(covariance):
    """Return a covariance in which two inputs are constant."""
    covariance[:, [2, 7]] = 0
    covariance[:, :, [2, 7]] = 0
    return covariance


def indefinite(rng):
    """Return a covariance from float32 products, as in moments.py, of inputs that vary by 1e-4 of their mean."""
    inputs = (5 + 5e-4 * rng.normal(size=(12, 40))).astype(np.float32)
    mean = inputs.mean(axis=1, dtype=np.float64)
    covariance = (inputs @ inputs.T / 40).astype(np.float64) - np.outer(mean, mean)
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), 0.0))
    assert np.linalg.eigvalsh(covariance)[0] < -np.diag(covariance).mean()
    return covariance[None]


HARD = {
    "two dead inputs": lambda rng: dead(covariances(rng, 1, 12, 100)),
    "all inputs dead": lambda rng: np.zeros((1, 12, 12)),
    "fewer samples than inputs": lambda rng: covariances(rng, 1, 12, 3),
    "one sample": lambda rng: covariances(rng, 1, 12, 1),
    "an input twice": lambda rng: np.ones((1, 12, 12)),
    "tiny": lambda rng: 1e-30 * covariances(rng, 1, 12, 5),
    "huge": lambda rng: 1e30 * covariances(rng, 1, 12, 5),
    "indefinite": indefinite,
    "very unlike ranges": lambda rng: np.diag(np.geomspace(1e-12, 1e12, 12))[None],
}


@pytest.mark.parametrize("damping", [0.02, 0.3])
@pytest.mark.parametrize("kind", HARD)
def test_hard_covariances(kind, damping):
    rng = np.random.default_rng(2)
    covariance = HARD[kind](rng)
    _, weights, scales, low, high = problem(rng)
    compensator = Compensator.of(covariance, damping)
    integers, error = compensator.round(weights, scales, low, high)
    np.testing.assert_array_equal(integers, np.rint(integers))
    assert np.all(integers >= low[..., None])
    assert np.all(integers <= high[..., None])
    np.testing.assert_allclose(error, loss(compensator.hessian, weights, integers, scales), rtol=1e-6)
    refitted = compensator.refit(weights, integers, scales, np.full_like(scales, 1e-9))
    assert np.isfinite(refitted).all()
    assert np.all(refitted > 0)


def test_dead_inputs_are_rounded_to_nearest():
    """They neither compensate nor are compensated."""
    rng = np.random.default_rng(3)
    covariance, weights, scales, low, high = problem(rng)
    integers, _ = Compensator.of(dead(covariance), DAMPING).round(weights, scales, low, high)
    np.testing.assert_array_equal(integers[..., [2, 7]], nearest(weights, scales, low, high)[..., [2, 7]])


def test_refit_lowers_the_error_to_its_least():
    rng = np.random.default_rng(4)
    covariance, weights, scales, low, high = problem(rng, groups=2, inputs=40)
    compensator = Compensator.of(covariance, DAMPING)
    integers, before = compensator.round(weights, scales, low, high)
    refitted = compensator.refit(weights, integers, scales, np.full_like(scales, 1e-9))
    after = loss(compensator.hessian, weights, integers, refitted)
    assert np.all(after <= before * (1 + 1e-12))
    assert after.sum() < 0.99 * before.sum()
    for factor in (0.999, 1.001):
        assert np.all(loss(compensator.hessian, weights, integers, refitted * factor) > after)


def test_refit_respects_the_floor_and_keeps_scales_of_zeros():
    covariance, weights, scales, low, high = problem(np.random.default_rng(5))
    compensator = Compensator.of(covariance, DAMPING)
    integers, _ = compensator.round(weights, scales, low, high)
    np.testing.assert_array_equal(compensator.refit(weights, integers, scales, scales * 10), scales * 10)
    floor = np.full_like(scales, 1e-9)
    np.testing.assert_array_equal(compensator.refit(weights, np.zeros_like(integers), scales, floor), scales)
    # No positive scale makes integers of the wrong sign fit.
    np.testing.assert_array_equal(compensator.refit(-integers * scales[..., None], integers, scales, floor), scales)


def of_blocks(rng, rows=5, blocks=3, size=12, bits=3):
    """Return (covariance, weights [R, K], scales [B, R], low, high, columns)."""
    covariance, weights, _, low, high = problem(rng, rows=rows, inputs=blocks * size, bits=bits)
    weights *= np.repeat(10.0 ** rng.uniform(-1, 1, (rows, blocks)), size, axis=1)
    peaks = np.abs(weights.reshape(rows, blocks, size)).max(axis=2).T
    scales = peaks * rng.choice([-1, 1], peaks.shape) / 2 ** (bits - 1)
    return covariance, weights, scales, low, high, np.arange(blocks * size)[None] // size


@pytest.mark.parametrize("size", [3, 12, 24])
def test_each_block_of_columns_has_its_scale(size):
    rng = np.random.default_rng(size)
    covariance, weights, scales, low, high, columns = of_blocks(rng, size=size)
    integers, error = Compensator.of(covariance, DAMPING).round(weights, scales[None], low, high, columns)
    (hessian,), each = damped(covariance, DAMPING), scales.T[:, columns[0]]
    for row in range(len(each)):
        # With weights and scales as multiples of the scale, all scales are 1.
        scaled = hessian * each[row] * each[row][:, None]
        order = np.argsort(-np.diag(hessian), kind="stable")
        left, found = weights[0, row] / each[row], np.zeros(len(order))
        for k, index in enumerate(order):
            rest = order[k + 1 :]
            found[index] = np.clip(np.rint(left[index]), low[0, row], high[0, row])
            left[rest] += np.linalg.solve(scaled[np.ix_(rest, rest)], scaled[rest, index]) * (
                left[index] - found[index]
            )
        np.testing.assert_array_equal(integers[0, row], found)
        distance = weights[0, row] - found * each[row]
        np.testing.assert_allclose(error[0, row], distance @ hessian @ distance, rtol=1e-6)


def test_scales_of_blocks_are_refitted_together():
    rng = np.random.default_rng(3)
    covariance, weights, scales, low, high, columns = of_blocks(rng)
    compensator = Compensator.of(covariance, DAMPING)
    integers, error = compensator.round(weights, scales[None], low, high, columns)
    (hessian,), q = damped(covariance, DAMPING), integers[0].reshape(5, 3, 12)
    found = compensator.refit_blocks(weights[0], integers[0], scales.T)
    for row in range(5):
        matrix = np.zeros((36, 3))
        for b in range(3):
            matrix[12 * b : 12 * (b + 1), b] = q[row, b]
        factor = np.linalg.cholesky(hessian).T
        expected, *_ = np.linalg.lstsq(factor @ matrix, factor @ weights[0, row])
        np.testing.assert_allclose(found[row], expected, rtol=2e-3)
        left = weights[0, row] - matrix @ found[row]
        assert left @ hessian @ left < error[0, row]


def test_a_block_of_zeros_keeps_its_scale():
    rng = np.random.default_rng(4)
    covariance, weights, scales, *_ = of_blocks(rng)
    integers = rng.integers(-3, 4, (5, 36)).astype(np.int8)
    integers[:, :12] = 0
    found = Compensator.of(covariance, DAMPING).refit_blocks(weights[0], integers, halved(scales.T))
    np.testing.assert_array_equal(found[:, 0], halved(scales.T)[:, 0])
