"""Rows measured here: every node in every form, read back as a file, and a latency budget that removes channels."""

import json
from pathlib import Path

import numpy as np
import pytest

from rdoq_onnx.model.cost_rows import parse_cost
from tests.conftest import ROOT
from tests.test_cli import FEW, Main, main  # noqa: F401

CNN = ROOT / "models" / "digits_cnn.onnx"


@pytest.mark.usefixtures("steady_times")
def test_rows_are_kept_and_reused(main: Main, tmp_path: Path) -> None:  # noqa: F811
    output, rows, report = tmp_path / "out.onnx", tmp_path / "rows.csv", tmp_path / "out.json"
    options = ("--effort", "fast", "--threads", "1", *FEW)
    run = main(CNN, output, "--latency", "100%", "--cost-template", rows, "--json", report, *options)
    assert run.code == 0
    cost = parse_cost(rows.read_text(), "rows.csv")
    assert cost.unit == "us"
    by_width = {}
    for row in cost.rows:
        by_width[row.weight_bits] = by_width.get(row.weight_bits, 0.0) + row.cost
    assert by_width[(1, 8)] == pytest.approx(2000, rel=1e-4)
    assert by_width[(32, 32)] == pytest.approx(4000, rel=1e-4)
    assert by_width[(0, 0)] < by_width[(1, 8)]
    document = json.loads(report.read_text())
    assert document["cost"]["at_8_bits"] == pytest.approx(2000)
    assert document["cost"]["spent"] == pytest.approx(2000)
    assert document["cost"]["measured"] > 0
    again = main(CNN, tmp_path / "again.onnx", "--cost", rows, "--latency", "100%", *options)
    assert again.code == 0
    assert (tmp_path / "again.onnx").read_bytes() == output.read_bytes()
    kept = main(CNN, tmp_path / "kept.onnx", "--cost", rows, "--latency", "1.9ms", "--json", report, *options)
    assert kept.code == 0
    document = json.loads(report.read_text())
    assert document["cost"]["spent"] <= 1900
    widths = np.concatenate([layer["bits"] for layer in document["layers"]])
    assert (widths == 0).any()
    assert set(widths.tolist()) <= {0, 7}


@pytest.mark.usefixtures("steady_times")
def test_without_a_name_rows_are_kept_beside_the_output(main: Main, tmp_path: Path) -> None:  # noqa: F811
    """Measured once for both budgets; a run with the file gives the bytes of the run that measured."""
    names, options = ("95%", "99%"), ("--effort", "fast", "--threads", "1", *FEW)
    run = main(CNN, tmp_path / "first_{budget}.onnx", "--latency", ",".join(names), *options)
    assert run.code == 0
    rows = tmp_path / "digits_cnn.cost.csv"
    assert f"--cost measured: kept in {rows}; the same run with --cost {rows} gives the same bytes" in run.err
    again = main(CNN, tmp_path / "again_{budget}.onnx", "--cost", rows, "--latency", ",".join(names), *options)
    assert again.code == 0
    assert "kept in" not in again.err
    first, second = ([(tmp_path / f"{k}_{n}.onnx").read_bytes() for n in names] for k in ("first", "again"))
    assert first == second
    assert first[0] != first[1]


def test_pins_that_leave_no_full_width(main: Main, tmp_path: Path) -> None:  # noqa: F811
    run = main(CNN, tmp_path / "out.onnx", "--cost", "measured", "--layer-limit", "100", *FEW)
    assert run.code == 3
    assert "--cost measured times the network at full width" in run.err


def test_a_template_of_times_needs_the_quantized_model(main: Main, tmp_path: Path) -> None:  # noqa: F811
    run = main(CNN, "--cost", "measured", "--cost-template", tmp_path / "rows.csv", *FEW)
    assert run.code == 2
    assert "--cost measured times the quantized model: give OUTPUT too" in run.err
