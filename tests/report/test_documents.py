"""The files of several budgets: one each where the name holds the budget, else all in one."""

import json
from pathlib import Path

import numpy as np
import pytest

from rdoq_onnx import cli
from rdoq_onnx.report.documents import Documents
from rdoq_onnx.system.curve_files import CurveFiles
from rdoq_onnx.system.files import Files
from tests.verification.test_layer_outputs import DATA, FIRST, SECOND, model_of


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("in.onnx").write_bytes(model_of(FIRST, SECOND).SerializeToString())
    np.savez("x.npz", **DATA)
    run = ["in.onnx", "out{bits}.onnx", "--calibration", "x.npz", "--effort", "fast", "--threads", "1", "--quiet"]
    return [*run, "--bits", "2,5"]


def test_all_budgets_in_one_file(arguments: list[str]) -> None:
    cli.main([*arguments, "--report", "page.html", "--json", "list.json"])
    assert [d["output"] for d in json.loads(Path("list.json").read_text())] == ["out2.onnx", "out5.onnx"]
    page = Path("page.html").read_text()
    assert [f'data-run="{k}"'.replace('"', "'") in page for k in range(3)] == [True, True, False]
    assert {p.name for p in Path().glob("*.html")} == {"page.html"}


def test_a_file_for_each_budget(arguments: list[str]) -> None:
    cli.main([*arguments, "--report", "page{bits}.html", "--json", "report{bits}.json"])
    assert {p.name for p in Path().glob("*.html")} == {"page2.html", "page5.html"}
    for bits in "25":
        assert json.loads(Path(f"report{bits}.json").read_text())["output"] == f"out{bits}.onnx"
        page = Path(f"page{bits}.html").read_text()
        assert f"out{bits}.onnx" in page
        assert "data-tab" not in page.replace("[data-tab]", "")


def test_budgets_that_miss_a_gate_are_on_the_page_with_the_reason(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--report", "page.html", "--min-sqnr", "15"])
    assert end.value.code == 4
    assert [*Path().glob("out*.onnx")] == [Path("out5.onnx")]
    page = Path("page.html").read_text()
    assert "none: --min-sqnr 15" in page
    assert "<td>out5.onnx</td>" in page
    assert "<td>out2.onnx</td>" not in page


def test_without_any_budget_met_there_is_no_page(tmp_path: Path) -> None:
    names = dict.fromkeys(("calibration", "validation", "modified"))
    json_, page = tmp_path / "a.json", tmp_path / "a.html"
    documents = Documents(
        Files("in.onnx", "out{bits}.onnx", json=str(json_), report=str(page), curves=CurveFiles(), **names), (), True
    )
    documents.failed("1", "too few")
    documents.finish()
    (only,) = json.loads(json_.read_text())
    assert (only["passed"], only["reason"]) == (False, "too few")
    assert not page.exists()
