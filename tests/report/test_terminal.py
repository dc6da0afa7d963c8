"""Progress of a run: lines in logs, bars on terminals, and nothing from a plain Progress."""

import io
import re

import pytest
from rich.console import Console

from rdoq_onnx.report import terminal
from rdoq_onnx.report.terminal import Bars, Lines, shown
from rdoq_onnx.system.progress import Progress


def test_lines_show_the_time_of_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        with progress.step("observe"):
            pass
        with progress.step("probe", 5) as advance:
            advance(5)
        with progress.step("second look"):
            pass
        progress.note("4.00 bits a weight")
    lines = capsys.readouterr().err.splitlines()
    said = (r"observe: 0\.0 s", r"probe: 0\.0 s, 5 parts", r"refinement: 0\.0 s", r"4\.00 bits a weight")
    for line, text in zip(lines, said, strict=True):
        assert re.fullmatch(rf"\d\d:\d\d:\d\d {text}", line)
    assert list(progress.seconds) == ["observe", "probe", "second look"]


def test_a_long_step_shows_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *range(15, 1000, 15)])
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    with Lines().show("probe", 4) as advance:
        for _ in range(4):
            advance(1)
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["probe: 2 of 4 parts, about 30 s left", "probe: 75.0 s, 4 parts"]


def test_bars_show_steps_and_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out, force_terminal=True, width=100))
    with bars.live:
        with bars.step("observe"):
            pass
        with bars.step("taylor", 8) as advance:
            advance(8)
        bars.note("4.00 bits a weight")
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", out.getvalue())
    assert "sensitivities" in text
    assert "8/8" in text
    assert "4.00 bits a weight" in text


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.note("hello")
    with progress.step("observe"):
        pass
    assert capsys.readouterr() == ("", "")
