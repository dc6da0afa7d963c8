"""The CSV of costs and the budgets beside it: what is read, and what is refused by line."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import FLOAT, Amount, CostRow, parse_amount, parse_cost, preset

HEAD = "layer,weight_bits,activation_bits,cost\n"


def test_rows():
    cost = parse_cost(f"\ufeff{HEAD}/0/Conv,8,8,41.5\n\n/2/.*, 1-4 ,*,12\nb,float,32,0\n", "t.csv", interpolated=True)
    assert cost.rows == (
        CostRow("/0/Conv", (8, 8), (8, 8), 41.5),
        CostRow("/2/.*", (1, 4), (0, FLOAT), 12.0),
        CostRow("b", (FLOAT, FLOAT), (FLOAT, FLOAT), 0.0),
    )
    assert (cost.name, cost.unit, cost.interpolated, cost.preset) == ("t.csv", "", True, False)


def test_unit_is_in_the_head():
    assert parse_cost(HEAD.replace("cost", "cost_us") + "a,8,8,1\n", "t.csv").unit == "us"


def test_identity_is_that_of_the_rows():
    one, other = (parse_cost(f"{HEAD}a,8,8,1\n", name) for name in ("a.csv", "b.csv"))
    assert one.identity == other.identity
    assert one.identity.startswith("sha256:")
    assert one.identity != parse_cost(f"{HEAD}a,8,8,2\n", "a.csv").identity
    assert preset("bops").identity == "bops"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its first line must be layer,weight_bits,activation_bits,cost"),
        ("layer,bits,cost\na,8,1\n", "its first line must be"),
        (HEAD, "has no rows; --cost-template"),
        (f"{HEAD}a,8,8\n", "line 2: has 3 cells"),
        (f"{HEAD}a,9,8,1\n", "line 2: width '9'; give 0 to 8"),
        (f"{HEAD}a,8,8,1\nb,4-2,8,1\n", "line 3: width '4-2'"),
        (f"{HEAD}a,8,8,\n", "line 2: cost ''; give a number"),
        (f"{HEAD}a,8,8,-1\n", "cost '-1'"),
        (f"{HEAD}a,8,8,nan\n", "cost 'nan'"),
        (f"{HEAD}(,8,8,1\n", r"layer '\(' is not a valid regular expression"),
        (f'{HEAD}"a,8,8,1\n', "is not valid CSV"),
    ],
)
def test_bad_files_are_refused_by_line(text, said):
    with pytest.raises(ConfigError, match=rf"^t\.csv.*{said}"):
        parse_cost(text, "t.csv")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ConfigError):
        assert parse_cost(HEAD + text, "t.csv").rows


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("12G", "bit operations", Amount(12e9)),
        ("40%", "us", Amount(40, percent=True)),
        ("1.5e3", "", Amount(1500)),
        ("1.5MB", "bytes", Amount(1.5e6)),
        ("2KiB", "bytes", Amount(2048)),
        ("3ms", "us", Amount(3000)),
        ("250us", "ms", Amount(0.25)),
        ("3", "us", Amount(3)),
    ],
)
def test_amounts(text, unit, amount):
    assert parse_amount("--budget", text, unit) == amount


@pytest.mark.parametrize(
    ("text", "unit"),
    [("much", ""), ("3ms", "bytes"), ("3ms", ""), ("1MB", "us"), ("-4", ""), ("4%B", "bytes"), ("", "")],
)
def test_other_amounts_are_refused(text, unit):
    with pytest.raises(ConfigError, match=r"--budget .* is not a budget; give for example .*40%"):
        parse_amount("--budget", text, unit)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="--cost 'bytes': give a CSV file, or one of size, bops, measured"):
        preset("bytes")
