"""Progress of a run: lines in logs, bars on terminals, and nothing from a plain Progress."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from rdoq_onnx.report import terminal
from rdoq_onnx.report.terminal import Bars, Lines, print_all, shown
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


def test_lines_tell_how_far_the_run_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: clock[0])
    lines = Lines()
    lines.expect(lambda: {"normalize": 5.0, "taylor": 60.0, "verify": 40.0})
    with lines.step("taylor", 4) as advance:
        clock[0] = 25.0
        advance(1)
        clock[0] = 60.0
        advance(3)
    with lines.step("verify"):
        clock[0] = 100.0
    said = [line[9:] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "about 2 min expected",
        "sensitivities: 1 of 4 parts, about 75 s left; 18 % of the run, about 2 min left",
        "sensitivities: 60.0 s, 4 parts",
        "60 % of the run, about 40 s left",
        "verify: 40.0 s",
        "100 % of the run, about 0 s left",
    ]


def test_bars_tell_how_far_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = [0.0], io.StringIO()
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: clock[0])
    bars = Bars(Console(file=out, force_terminal=True, width=100))
    bars.expect(lambda: {"taylor": 600.0})
    with bars.live, bars.step("taylor", 2) as advance:
        clock[0] = 240.0
        advance(1)
        bars.live.refresh()
    assert "about 4 min left" in out.getvalue()
    unknown = Bars(Console(file=out))
    unknown.expect(dict)
    assert unknown.whole == ""


LONG = "the activations of this network cause nearly all of the distortion: give them more bits than the weights"


def test_a_terminal_gets_whole_words_and_a_pipe_whole_lines() -> None:
    pin = "  --pin '/features/features.0/Conv=4'  # Conv, 32 channels, 4.00 bits on average, 8-bit input"
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("gain over one width everywhere", LONG)
    shown = io.StringIO()
    print_all(Console(file=shown, force_terminal=True, width=60), [LONG, pin, table])
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown.getvalue())
    lines = text.splitlines()
    assert max(len(line) for line in lines if "--pin" not in line) <= 60
    assert set(re.findall(r"[\w-]+", LONG)) <= set(re.findall(r"[\w-]+", text.split("--pin")[0]))
    assert set(re.findall(r"[\w-]+", LONG)) <= set(re.findall(r"[\w-]+", text.split("--pin")[1]))
    assert pin in lines  # can be pasted
    assert any("gain over one width everywhere" in line for line in lines)
    piped = io.StringIO()
    print_all(Console(file=piped, width=60), [LONG])
    assert piped.getvalue() == f"{LONG}\n"


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.note("hello")
    with progress.step("observe"):
        pass
    assert capsys.readouterr() == ("", "")
