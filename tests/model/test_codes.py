"""Quantized values: `Affine` matches ONNX's arithmetic bit for bit; float16 stores the scales exactly."""

import numpy as np
import pytest
from onnx import parser

from rdoq_onnx.candidates.activations import affine_candidates
from rdoq_onnx.model.codes import Affine, WeightCodes, halved, stored


def onnx_quantizer(affine, ort_run):
    """The output of ONNX Runtime for the emitted nodes."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N] x) => (float[N] y)
    <float s = {{{affine.scale!r}}}, uint8 z = {{{affine.zero_point}}}, uint8 top = {{{affine.high}}}>
    {{ q = QuantizeLinear (x, s, z) c = Clip (q, , top) y = DequantizeLinear (c, s, z) }}""")

    def run(x):
        return ort_run(model, {"x": x}, "none")[0]

    return run


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.3, 2.9), (-5.0, -1.0), (-1e-3, 1e-3), (0.0, 3e4)])
def test_affine_is_what_onnx_computes(ort_run, bits, low, high):
    rng = np.random.default_rng(bits)
    for candidate in affine_candidates(low, high, bits):
        scale = np.float32(candidate.scale)
        ties = (np.arange(-300, 300) + np.float32(0.5)) * scale
        x = np.concatenate([rng.uniform(2 * low - high, 2 * high - low, 500), ties, [0]]).astype(np.float32)
        given_x = x.copy()
        got = candidate(x)
        np.testing.assert_array_equal(got, onnx_quantizer(candidate, ort_run)(x))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(x, given_x)


def test_bits_of_an_affine_quantizer():
    assert [Affine(1.0, 0, 0, top).bits for top in (1, 3, 15, 255)] == [1, 2, 4, 8]


def test_weights_are_dequantized_by_row():
    codes = WeightCodes(np.array([[1, -2], [3, 0]], np.int8), np.array([0.5, 2], np.float32))
    np.testing.assert_array_equal(codes.values, [[0.5, -1], [6, 0]])
    assert codes.values.dtype == np.float32


def test_the_range_of_a_quantizer_is_what_it_can_represent():
    quantizer = Affine(0.25, 3, 0, 15)
    values = quantizer(np.linspace(-50, 50, 999, dtype=np.float32))
    assert (values.min(), values.max()) == quantizer.range == (-0.75, 3.0)


def test_stored_scales_have_eleven_significant_bits():
    scales = np.array([1 / 3, 1.0, 1 + 2.0**-11, 2.0**-40])
    found = stored(scales)
    np.testing.assert_allclose(found, scales, rtol=2.0**-11)
    assert (np.frexp(found)[0] * 2048 % 1 == 0).all()
    np.testing.assert_array_equal(stored(found), found)


def test_a_change_by_rounding_alone_is_none():
    codes = WeightCodes(np.array([[1, -2], [3, 0], [0, 0]], np.int8), np.array([0.1, 0.2, 1], np.float32))
    rows = codes.values.astype(np.float64)
    rows[0] *= 1 + 1e-7
    rows[1, 1] = 1e-9  # only 0 is equal to 0
    change = codes.change(rows)
    assert not change[[0, 2]].any()
    assert change[1, 1] == -1e-9


def test_rows_of_other_codes():
    one = WeightCodes(np.array([[1, 2], [3, 4]], np.int8), np.array([0.1, 0.2], np.float32))
    other = WeightCodes(-one.integers, one.scales + 1)
    mixed = one.replaced(other, np.array([False, True]))
    assert mixed.integers.tolist() == [[1, 2], [-3, -4]]
    assert mixed.integers.dtype == np.int8
    assert mixed.scales.tolist() == [one.scales[0], other.scales[1]]


def test_each_block_of_a_row_has_its_scale():
    codes = WeightCodes(np.array([[1, -2, 3, 0], [1, 1, 1, 1]], np.int8), np.array([[0.5, -2], [1, 4]], np.float32))
    np.testing.assert_array_equal(codes.values, [[0.5, -1, -6, 0], [1, 1, 4, 4]])
    other = WeightCodes(-codes.integers, codes.scales + 1)
    mixed = codes.replaced(other, np.array([True, False]))
    np.testing.assert_array_equal(mixed.values, [other.values[0], codes.values[1]])
    np.testing.assert_array_equal(codes.taken(np.array([1])).values, codes.values[1:])


def test_halved_scales_are_float16_and_never_0():
    scales = np.array([1 / 3, -1 / 3, 1e-12, -1e-12, 1e9])
    found = halved(scales)
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float64))
    np.testing.assert_allclose(found[:2], scales[:2], rtol=2.0**-11)
    assert (np.sign(found) == np.sign(scales)).all()
    assert (np.abs(found) > 0).all()
    assert np.isfinite(found).all()
