"""Adam: the first step, convergence, arrays without a rate."""

import numpy as np

from rdoq_onnx.reconstruction.adam import Adam


def test_the_first_step_is_the_rate_whatever_the_gradient():
    x = np.zeros(3, np.float32)
    Adam.of([x]).step([np.array([1e-6, -5, 300], np.float32)], [0.1], 1)
    np.testing.assert_allclose(x, [-0.1, 0.1, -0.1], rtol=1e-4)


def test_it_finds_the_minimum_of_a_quadratic():
    x = np.array([4.0, -3.0], np.float32)
    adam, scales = Adam.of([x]), np.array([1.0, 100.0], np.float32)
    for count in range(1, 400):
        adam.step([scales * (x - 1)], [0.1 * (1 - count / 400)], count)
    np.testing.assert_allclose(x, 1, atol=0.02)


def test_without_a_rate_or_a_gradient_nothing_moves():
    still, zero = np.ones(2, np.float32), np.ones(2, np.float32)
    adam = Adam.of([still, zero])
    for count in range(1, 5):
        adam.step([np.ones(2, np.float32), np.zeros(2, np.float32)], [0.0, 0.1], count)
    np.testing.assert_array_equal(still, 1)
    np.testing.assert_array_equal(zero, 1)
