"""Options of a cost and its budget: short forms, lists, and what contradicts."""

import pytest

from rdoq_onnx.cost.given import OPTIONS, Given, given_costs, read_cost
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import Amount, preset

ROWS = "layer,weight_bits,activation_bits,cost_us\n.*,*,*,4\n"


def given(**typed):
    return given_costs(dict.fromkeys(OPTIONS) | {"interpolate": False} | typed)


def test_short_forms():
    assert given() == Given()
    assert given(cost="bops") == Given(preset("bops"))
    assert given(bops="12G") == Given(preset("bops"), (("12G", Amount(12e9)),), "--bops")
    assert given(latency="3ms") == Given(preset("measured"), (("3ms", Amount(3000)),), "--latency")
    listed = given(cost="size", budget="1kB, 40%")
    assert listed.budgets == (("1kB", Amount(1000)), ("40%", Amount(40, percent=True)))


def test_a_file_of_times_takes_a_latency(tmp_path):
    path = tmp_path / "kept.csv"
    path.write_text(ROWS)
    found = given(cost=str(path), latency="3ms", interpolate=True)
    assert found.cost is not None
    assert (found.cost.name, found.cost.unit, found.cost.interpolated) == (str(path), "us", True)
    assert found.budgets == (("3ms", Amount(3000)),)
    path.write_text(ROWS.replace("cost_us", "cost"))
    with pytest.raises(ConfigError, match=r"--latency is a time, but --cost .* is none; name its last column cost_us"):
        given(cost=str(path), latency="3ms")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"budget": "40%"}, "--budget counts what --cost says; give --cost too, or --bops"),
        ({"budget": "40%", "bops": "4"}, "--budget and --bops are both budgets; give one"),
        ({"bops": "4", "cost": "size"}, "--bops is short for --cost bops --budget, so it cannot go with --cost size"),
        ({"interpolate": True}, "--interpolate says how to read a --cost file; give one"),
        ({"interpolate": True, "cost": "bops"}, "--interpolate .* and 'bops' is none"),
        ({"cost": "flops"}, "--cost 'flops': give a CSV file, or one of size, bops, measured"),
        ({"cost": "none/such"}, "--cost 'none/such': give a CSV file, or one of size, bops, measured"),
        ({"cost": "none/such.csv"}, "none/such.csv: cannot be read .*; give a CSV file"),
        ({"bops": "3ms"}, "--bops '3ms' is not a budget"),
    ],
)
def test_contradictions(typed, said):
    with pytest.raises(ConfigError, match=said):
        given(**typed)


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_cost(str(path))
