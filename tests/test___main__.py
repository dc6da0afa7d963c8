"""`python -m rdoq_onnx` is the command."""

import runpy

import pytest

from rdoq_onnx import __version__


def test_the_package_runs_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["rdoq-onnx", "--version"])
    runpy.run_module("rdoq_onnx", run_name="__main__")
    assert capsys.readouterr().out.strip() == __version__


def test_other_arguments_go_to_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rdoq-onnx", "--help"])
    runpy.run_module("rdoq_onnx", run_name="__main__")
    assert "--weight-bits" in capsys.readouterr().out
