"""Runs of the command line on networks of growing size, and the exponents of their time and memory.

Fitted is y = a xᵇ, by least squares in the logarithms. A fixed cost lowers b, so b over the last two points stands
beside b over all.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from judging import FailedError
from networks import samples_of, write
from shapes import Decoder, Encoder

COLUMNS = ("network", "layers x width", "weights", "samples x tokens")
FIGURES = ("seconds", "processor s", "peak MiB", "peak / model")


@dataclass(frozen=True)
class Run:
    """Cost of a run: wall and processor seconds of the whole, peak in bytes, seconds of each step."""

    seconds: float
    processor: float
    peak: int
    steps: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """A network and its samples; `size` is what grows from point to point."""

    size: int
    shape: Decoder | Encoder
    samples: int
    tokens: int

    def cells(self) -> tuple[str, ...]:
        """Describe the point in the cells of COLUMNS."""
        shape = self.shape
        weights = f"{shape.weights / 1e6:.1f} M"
        kind = type(shape).__name__.lower()
        return kind, f"{shape.layers} x {shape.width}", weights, f"{self.samples} x {self.tokens}"


def run(model: Path, calibration: Path, folder: Path, *options: str) -> Run:
    """Run the command line in a process of its own; its files go to `folder`. Raises FailedError."""
    report = folder / "report.json"
    files = [model, folder / "out.onnx", "--calibration", calibration, "--json", report]
    command = [sys.executable, "-m", "rdoq_onnx", *map(str, files), "--quiet", *options]
    begin = time.perf_counter()
    # In the root, -m would find the source folder, which lacks passes/, before the installed package.
    with subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        message = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if child.returncode:
        ended = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise FailedError((message.strip().splitlines() or [ended])[-1])
    steps = json.loads(report.read_text())["seconds"]
    return Run(seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss, steps)


def measure(point: Point, options: Sequence[str]) -> Run:
    """Make the network and its samples in a temporary folder and run the command line on them. Raises FailedError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, calibration = folder / "model.onnx", folder / "calib.npz"
        write(point.shape, model)
        samples_of(point.shape, calibration, point.samples, point.tokens)
        return run(model, calibration, folder, *options)


def growth_rows(
    points: Sequence[Point], options: Sequence[str], done: dict[Point, Run], missed: list[str]
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each point as it is measured, then the exponents; the runs go to `done`, failures to `missed`."""
    for point in points:
        try:
            done[point] = made = measure(point, options)
        except FailedError as error:
            missed.append(str(error))
            yield *point.cells(), "FAILED", "", "", str(error)
            continue
        ratio = made.peak / (4 * point.shape.weights)
        figures = f"{made.seconds:.1f}", f"{made.processor:.1f}", f"{made.peak / 2**20:.0f}", f"{ratio:.1f}"
        yield *point.cells(), *figures
    sizes = [p.size for p in done]
    figures_of = [(r.seconds, r.processor, float(r.peak)) for r in done.values()]
    for label, last in (("exponent", len(sizes)), ("exponent, last two points", 2)):
        fitted = [exponent(sizes[-last:], values[-last:]) for values in zip(*figures_of, strict=True)]
        yield label, "", "", "", *(fitted or [""] * 3), ""


def step_rows(done: Mapping[Point, Run]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each step: its seconds at each point, and their exponent."""
    sizes = [p.size for p in done]
    for step in dict.fromkeys(name for made in done.values() for name in made.steps):
        seconds = [made.steps.get(step, 0.0) for made in done.values()]
        yield step, *(f"{s:.2f}" for s in seconds), exponent(sizes, seconds)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> str:
    """Fit b, or return nothing where fewer than two sizes or a value of 0 leave none."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return ""
    return f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}"
