"""Figures in words."""

import shlex

import pytest

from rdoq_onnx.report.wording import decibels, histogram, human_bytes, kernel_words, pin_of, times


@pytest.mark.parametrize("name", ["conv1", "a b", "it's", "x[2:8]", "f(x"])
def test_a_pin_is_one_word_for_the_shell(name):
    option, value = shlex.split(pin_of(name, 3.6))
    assert option == "--pin"
    assert value.endswith("=4")


def test_decibels():
    assert decibels(100, 1) == "20.00 dB"
    assert decibels(1, 2) == "-3.01 dB"
    assert decibels(0, 1) == decibels(1, 0) == "0 dB"


def test_sizes_in_thousands():
    assert [human_bytes(n) for n in (0, 1234, 999_949, 1_000_000)] == ["0.0 kB", "1.2 kB", "999.9 kB", "1.00 MB"]


def test_short_steps_are_in_the_sum_alone():
    assert times({"taylor": 9.0, "verify": 0.9, "read": 0.1}) == "10.0 s: taylor 9.0, verify 0.9"


def test_only_integer_kernels_count():
    assert kernel_words({"Conv": 2, "QLinearConv": 3, "MatMulIntegerToFloat": 1}) == (
        "3 QLinearConv, 1 MatMulIntegerToFloat"
    )
    assert kernel_words({"Conv": 2}) == "none"


def test_histogram_of_widths():
    assert histogram({2: 3, 4: 1}) == "2b:3  4b:1"
