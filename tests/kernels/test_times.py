"""Predicted times rank the kernels as profiles of ONNX Runtime did."""

import pytest

from rdoq_onnx.kernels.times import float_time, integer_time
from rdoq_onnx.model.linear import Linear


def conv(outputs, inputs, kernel, group=1, op="Conv"):
    return Linear(op, (outputs, inputs, kernel, kernel), group=group)


# Profiled with ONNX Runtime 1.32 (AVX-512 VNNI): microseconds for a sample in float and on integers.
PROFILES = {
    "1x1, 256 to 256, 14x14": (conv(256, 256, 1), 256 * 14 * 14, 100, 29),
    "3x3, 96 to 24, 80x80": (conv(24, 96, 3), 24 * 80 * 80, 1351, 380),
    "3x3, 3 to 16, 112x112": (conv(16, 3, 3), 16 * 112 * 112, 150, 210),
    "depthwise 5x5, 256, 14x14": (conv(256, 1, 5, 256), 256 * 14 * 14, 20, 22),
    "depthwise 5x5, 200, 2x96": (conv(200, 1, 5, 200), 200 * 2 * 96, 13, 54),
}


@pytest.mark.parametrize("name", PROFILES)
def test_times_are_those_of_profiles(name):
    linear, outputs, in_float, on_integers = PROFILES[name]
    assert float_time(linear, outputs) / 1000 == pytest.approx(in_float, rel=0.35)
    assert integer_time(linear, outputs) / 1000 == pytest.approx(on_integers, rel=0.35)


def test_a_transposed_convolution_gains_nothing():
    linear = Linear("ConvTranspose", (24, 24, 2, 2))
    assert integer_time(linear, 24 * 160 * 160) > float_time(linear, 24 * 160 * 160)


def test_a_large_matrix_product_is_faster_on_integers():
    linear = Linear("Gemm", (512, 512), trans_b=True)
    assert integer_time(linear, 128 * 512) < float_time(linear, 128 * 512)
