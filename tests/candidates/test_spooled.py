"""Codes in a file against the same codes in memory."""

import numpy as np

from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.emission.quantized_model import mixed
from rdoq_onnx.model.codes import WeightCodes


def test_equal_the_codes_in_memory(tmp_path):
    rng, widths = np.random.default_rng(0), (0, 2, 3, 8)
    integers = rng.integers(-100, 100, (4, 7, 5)).astype(np.int8)
    scales = rng.random((4, 7)).astype(np.float32)
    np.save(tmp_path / "codes.npy", integers)
    codes = SpooledCodes(str(tmp_path), "codes", widths, scales)
    plain = {b: WeightCodes(integers[k], scales[k]) for k, b in enumerate(widths)}
    assert list(codes) == list(plain)
    assert len(codes) == 4
    assert 3 in codes
    for bits, code in codes.items():
        assert_equal(code, plain[bits])
    bits = np.array([2, 8, 0, 3, 3, 2, 8])
    assert_equal(mixed(codes, bits), mixed(plain, bits))
    assert_equal(codes.chosen(bits), mixed(plain, bits))
    assert_equal(codes.scaled(2 * scales)[3], WeightCodes(integers[2], 2 * scales[2]))


def assert_equal(one, other):
    np.testing.assert_array_equal(one.integers, other.integers)
    np.testing.assert_array_equal(one.scales, other.scales)
    assert one.integers.dtype == np.int8
