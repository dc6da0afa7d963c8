"""Variables: where they start, their gradients, their bounds."""

import numpy as np
import pytest

from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.reconstruction.parametrized import Site
from rdoq_onnx.reconstruction.variables import Bias, Quantizer, Weight

SITES = (Site("w", Linear("Gemm", (3, 4), trans_b=True)),)


def weight(blocks=0, rows=None):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 4)).astype(np.float32) if rows is None else rows
    scales = np.full((3, blocks) if blocks else 3, 0.5, np.float32)
    if blocks:
        scales[:, -1] = -0.25
    codes = WeightCodes(rng.integers(-2, 2, (3, 4)).astype(np.int8), scales)
    bounds = (np.full((3, 1), -2, np.float32), np.full((3, 1), 1, np.float32))
    return Weight.of(SITES, rows, codes, bounds), codes


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_weight_starts_at_its_codes(blocks):
    found, codes = weight(blocks)
    np.testing.assert_array_equal(found.codes.integers, codes.integers)
    np.testing.assert_array_equal(found.codes.scales, codes.scales)
    np.testing.assert_array_equal(found.feeds()["w"], codes.values)


@pytest.mark.parametrize("blocks", [0, 2])
def test_gradients_of_scales_match_differences(blocks):
    found, _ = weight(blocks)
    adjoint = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    _, slope = found.gradients({"w": adjoint})
    step = np.float32(1e-2)
    for place in np.ndindex(found.t.shape):
        values = []
        for sign in (1, -1):
            found.t[place] = sign * step
            values.append(float((found.feeds()["w"] * adjoint).sum()))
        found.t[place] = 0
        assert slope[place] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_a_tied_weight_adds_its_gradients_up():
    one, _ = weight()
    two = Weight((*SITES, Site("table", Linear("Gather", (3, 4), axes=(0,)))), *list(vars(one).values())[1:])
    adjoint = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(
        two.gradients({"w": adjoint, "table": 2 * adjoint})[0], 3 * one.gradients({"w": adjoint})[0]
    )


def test_codes_stay_in_their_window():
    found, _ = weight()
    found.v[:] = 100
    found.confine(0.0)
    assert (found.codes.integers == 1).all()
    assert found.v.max() <= 1.5


def test_weights_are_pulled_to_their_integers():
    found, codes = weight()
    apart = np.abs(found.v - codes.integers)
    found.confine(0.25)
    np.testing.assert_allclose(np.abs(found.v - codes.integers), 0.75 * apart, atol=1e-6)


def test_scales_are_stored_as_a_file_stores_them():
    found, _ = weight()
    found.t[:] = 0.1234
    mantissa, _ = np.frexp(found.codes.scales.astype(np.float64))
    np.testing.assert_array_equal(mantissa * 2048, np.rint(mantissa * 2048))


def test_a_bias_moves_by_its_unit():
    bias = Bias("b", np.array([1.0, 2.0], np.float32), 0.5, np.zeros(2, np.float32))
    np.testing.assert_array_equal(bias.feeds()["b"], [1, 2])
    bias.beta[:] = 1
    np.testing.assert_array_equal(bias.feeds()["b"], [1.5, 2.5])
    np.testing.assert_array_equal(bias.gradients({"b": np.array([4.0, 2.0], np.float32)})[0], [2, 1])


def quantizer(start, reach=10.0, zero="z"):
    return Quantizer("s", zero, start, reach, np.zeros(1, np.float32), np.full(1, start.zero_point, np.float32))


def test_a_quantizer_starts_as_it_is():
    start = Affine(0.1, 3, 0, 15)
    assert quantizer(start).affine == start


def test_its_range_stays_within_reach():
    found = quantizer(Affine(0.4, 0, 0, 15), reach=6.0)
    found.t[:] = 1
    found.confine(0.0)
    assert found.affine.range[1] == pytest.approx(6.0)


def test_a_zero_point_is_an_integer_of_the_range():
    found = quantizer(Affine(0.1, 3, 0, 15))
    for u, zero in ((4.6, 5), (-2.0, 0), (99.0, 15)):
        found.u[:] = u
        assert found.affine.zero_point == zero
        assert found.feeds()["z"] == [zero]


def test_a_quantizer_without_a_zero_point_has_one_input():
    found = quantizer(Affine(0.1, 0, 0, 15), zero="")
    assert list(found.feeds()) == ["s"]
    assert found.gradients({"s": np.ones(1, np.float32)})[1] == 0
