"""What other work takes from the processors of this process."""

import math
import os
import time
from pathlib import Path

import pytest

from rdoq_onnx.system import load
from rdoq_onnx.system.load import Clocks

TABLE = """cpu  10 20 30 40 50 60 70 80 90 100
cpu0 100 200 300 4000 5000 10 20 30 7 8
cpu1 1 2 3 4 5 6 7 8 9 10
intr 1 2 3
"""


def table(folder: Path, text: str) -> Path:
    path = folder / "stat"
    path.write_text(text)
    return path


def test_time_that_is_neither_idle_nor_waiting_is_work(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    path = table(tmp_path, TABLE)
    assert load._everything(path, frozenset({0})) == 660 / tick
    assert load._everything(path, frozenset({0, 1})) == 687 / tick
    assert load._everything(path, frozenset({2})) is None
    assert load._everything(tmp_path / "none", frozenset({0})) is None


def test_others_have_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_processors", lambda: frozenset({0, 1}))
    begin = Clocks(10.0, 1.0, 100.0)
    assert Clocks(12.0, 3.0, 103.0).others(begin) == pytest.approx(0.25)  # 1 of 4 processor seconds
    assert Clocks(12.0, 3.0, 102.0).others(begin) == 0
    assert Clocks(12.0, 3.0, 101.9).others(begin) == 0  # ticks are coarse
    assert Clocks(12.0, 1.0, 105.0).others(begin) == 1


def test_without_a_table_a_process_that_waits_is_kept_waiting() -> None:
    begin = Clocks(10.0, 1.0, None)
    assert Clocks(12.0, 2.0, None).others(begin) == pytest.approx(0.5)
    assert Clocks(12.0, 5.0, None).others(begin) == 0


def test_the_clocks_run() -> None:
    begin, end = Clocks.now(), time.perf_counter() + 0.01
    while time.perf_counter() < end:
        math.sqrt(2)
    assert 0 <= Clocks.now().others(begin) <= 1
