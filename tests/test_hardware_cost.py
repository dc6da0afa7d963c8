"""The walkthrough of costs: its commands run, its cost file counts what it says."""

import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest

from rdoq_onnx import cli
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "hardware-cost.md"


def commands() -> list[list[str]]:
    """The commands of the page, as arguments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("rdoq-onnx ")]


@pytest.mark.usefixtures("steady_times")
def test_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    models = tmp_path / "models"
    models.mkdir()
    for model in (ROOT / "models").glob("*.onnx"):
        (models / model.name).symlink_to(model)
    with np.load(ROOT / "models" / "digits_calib.npz") as data:
        np.savez(models / "digits_calib.npz", **{**data, "x": data["x"][:24]})
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert found
    for arguments in found:
        cli.main([*arguments, "--threads", "1", "--effort", "fast"])
    for path in tmp_path.glob("*.onnx"):
        onnx.checker.check_model(path)
    assert list(tmp_path.glob("*.onnx"))


def test_the_cost_file_counts_multiplications() -> None:
    """Cycles of npu.csv: multiplications of /3/Conv, 14 x 14 positions of 32 x 16 x 9, 64 in a cycle."""
    rows = (ROOT / "docs" / "npu.csv").read_text().splitlines()
    assert f"/3/Conv,5-8,1-8,{14 * 14 * 32 * 16 * 9 // 64}" in rows
    assert f"/3/Conv,1-4,1-8,{14 * 14 * 32 * 16 * 9 // 128}" in rows
