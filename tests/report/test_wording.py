"""The wording of figures."""

import shlex

import pytest

from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.report.wording import (
    about_bytes,
    decibels,
    histogram,
    human_bytes,
    kept_lines,
    kernel_words,
    percent,
    pin_of,
    skip_lines,
    step_name,
    times,
)


@pytest.mark.parametrize("name", ["conv1", "a b", "it's", "x[2:8]", "f(x"])
def test_a_pin_is_one_word_for_the_shell(name):
    option, value = shlex.split(pin_of(name, 3.6))
    assert option == "--pin"
    assert value.endswith("=4")


def test_decibels():
    assert decibels(100, 1) == "+20.00 dB"
    assert decibels(1, 2) == "-3.01 dB"
    assert decibels(0, 1) == decibels(1, 0) == "0 dB"


def test_a_negligible_share_is_zero():
    assert [percent(x) for x in (0.0, 1.33e-16, 9.9e-6)] == ["0 %"] * 3
    assert [percent(x) for x in (1e-5, 0.0532, 1.0)] == ["0.001 %", "5.32 %", "100 %"]


def test_sizes_in_thousands():
    assert [human_bytes(n) for n in (0, 1234, 999_949, 1_000_000)] == ["0.0 kB", "1.2 kB", "999.9 kB", "1.00 MB"]
    assert [about_bytes(n) for n in (0, 2_340_000, 23_400_000, 234_000_000)] == ["0.0 MB", "2.3 MB", "23 MB", "230 MB"]
    assert [about_bytes(n) for n in (999_000_000, 2_340_000_000, 23_400_000_000)] == ["1.0 GB", "2.3 GB", "23 GB"]


def test_steps_have_names_to_show():
    shown = ["input statistics", "sensitivities", "anchoring", "refinement", "emit"]
    assert [step_name(s) for s in ("moments", "taylor", "ties", "second look", "emit")] == shown


def test_short_steps_count_in_the_total_only():
    assert times({"taylor": 9.0, "verify": 0.9, "read": 0.1}) == "10.0 s: sensitivities 9.0, verify 0.9"


def test_only_integer_kernels_count():
    assert kernel_words({"Conv": 2, "QLinearConv": 3, "MatMulIntegerToFloat": 1}) == (
        "3 QLinearConv, 1 MatMulIntegerToFloat"
    )
    assert kernel_words({"Conv": 2}) == "none"


def test_histogram_of_widths():
    assert histogram({2: 3, 4: 1}) == "2: 3, 4: 1"


def test_nodes_in_float_for_the_same_reason_share_a_line():
    skips = [Skip("a", "Gemm", "excluded"), Skip("b", "MatMul", "too small"), Skip("c", "Conv", "excluded")]
    assert list(skip_lines(skips, each=False)) == ["Conv, Gemm, 2 nodes: excluded", "MatMul b: too small"]
    pinned = [Skip(n, "Conv", f"slower; --pin {pin}=8 quantizes it") for n, pin in (("d", "a/b"), ("e", "c"))]
    assert list(skip_lines(pinned, each=False)) == ["Conv, 2 nodes: slower; --pin TENSOR=8 quantizes it"]
    assert list(skip_lines(pinned[:1], each=False)) == ["Conv d: slower; --pin a/b=8 quantizes it"]
    assert list(skip_lines(skips, each=True)) == ["Gemm a: excluded", "Conv c: excluded", "MatMul b: too small"]


def test_channels_that_stay_for_one_reason_share_a_line():
    kept = {
        "a": ((0, "the count"), (1, "it varies where Conv x reads it")),
        "b": ((3, "the count"), (4, "the count"), (5, "it varies where Conv y reads it")),
    }
    assert list(kept_lines(kept, each=False)) == [
        "3 in 2 layers: the count",
        "2 in 2 layers: it varies where another layer reads it",
    ]
    assert list(kept_lines(kept, each=True))[:3] == [
        "1 of a: the count",
        "2 of b: the count",
        "1 of a: it varies where Conv x reads it",
    ]
    assert next(kept_lines({"a": kept["a"]}, each=False)) == "1 of a: the count"
