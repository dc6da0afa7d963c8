"""A dry run lists what a run would quantize, estimates its time and space, and writes nothing."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from rdoq_onnx import cli, pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.estimate.dry_run import dry_run, lines
from rdoq_onnx.estimate.space import Space
from tests.conftest import ROOT

CNN, CALIBRATION = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"


def test_lists_all_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run", None)
    cli.main([str(CNN), "--dry-run", "--samples", "16", "--threads", "1", "--exclude-op", "Gemm"])
    out = capsys.readouterr().out
    assert out.startswith("10 layers, 392 channels, 68,176 weights (272.7 kB in float)\n")
    assert "  --pin /0/Conv=7  # Conv, 16 channels, 144 weights, 16x1x3x3\n" in out
    assert "11 activations" in out or "10 activations" in out
    assert "3 extra 8-bit tensors, outside the budget" in out
    assert "left in float: 1 nodes\n  Gemm /16/Gemm: excluded by --exclude-op\n" in out
    assert re.search(r"about \d+ (s|min), [\d.]+ [MG]B of memory with 16 synthetic samples \(seconds: .*\d+\)", out)
    assert list(tmp_path.iterdir()) == []
    pins = [shlex.split(pin)[1] for pin in re.findall(r"^  (--pin \S+)", out, re.MULTILINE)]
    assert len(pins) >= 20


def test_more_to_do_takes_longer() -> None:
    def seconds(**config: object) -> dict[str, float]:
        return dict(dry_run(CNN, CALIBRATION, Config(threads=1, **config)).seconds)  # type: ignore[arg-type]

    few, many = seconds(samples=16, effort="fast"), seconds(samples=400, measure="probe", effort="best")
    assert min(few.values()) >= 0
    assert sum(few.values()) < sum(many.values())
    assert set(many) - set(few) == {"probe", "tuning"}
    assert "ties" in seconds(samples=400)


def test_says_what_a_run_lacks() -> None:
    few = dry_run(CNN, CALIBRATION, Config(samples=16, threads=1))
    assert not few.shortages
    assert not few.space.scratch
    short = replace(few, shortages=("no room",), space=Space(3_000_000, 2_000_000))
    *_, warning, estimate = lines(short)
    assert warning == "warning: no room"
    assert re.match(r"about \S+ \S+, 3.0 MB of memory and 2.0 MB of scratch space with 16 samples from ", estimate)
