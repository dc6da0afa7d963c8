"""Names and patterns in options: matches, channel ranges, and the hint where nothing matches."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdoq_onnx.analysis.patterns import as_pattern, channel_range, matches, nearest


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("conv1", True),
        ("conv", False),
        ("conv.*", True),
        ("onv1", False),
        ("w|conv1", True),
        ("", False),
    ],
)
def test_a_pattern_matches_a_whole_name(pattern, found):
    assert matches(pattern, ["x", "conv1"]) is found


def test_a_name_matches_itself_even_if_not_as_a_regex():
    assert matches("a+b", ["a+b"])
    assert matches("f(x)", ["f(x)"])


@example("[[a]")
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1))
def test_the_pattern_of_a_name_matches_it(name):
    pattern = as_pattern(name)
    assert matches(pattern, [name])
    assert channel_range(pattern)[1] is None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a[2:8]", ("a", slice(2, 8))),
        ("a[:8]", ("a", slice(None, 8))),
        ("a[2:]", ("a", slice(2, None))),
        ("a[2]", ("a[2]", None)),
        ("[2:8]", ("[2:8]", None)),
        ("a[x:]", ("a[x:]", None)),
        ("a", ("a", None)),
    ],
)
def test_channel_range_after_a_name(pattern, expected):
    assert channel_range(pattern) == expected


def test_the_nearest_name_is_offered():
    assert nearest("conv_1", ["gemm", "conv1"]) == "; the nearest is 'conv1'"
    assert nearest("conv_1", []) == ""
