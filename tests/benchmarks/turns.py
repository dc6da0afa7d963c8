"""Time two files in turns, so that other load on the machine affects both alike; measure memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from judging import program

_ROUND = 0.05  # seconds of one turn, long enough to hide clock resolution and thread switches
_RESIDENT = """
import sys, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@dataclass(frozen=True)
class Turns:
    """Median seconds of each, and the median over rounds of the ratio first / second."""

    first: float
    second: float
    ratio: float


def in_turns(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Time both `rounds` times in alternating order; a turn repeats the work for at least _ROUND seconds."""
    runs = max(1, round(_ROUND / max(_seconds(first, 1, clock), _seconds(second, 1, clock), 1e-6)))
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in (0, 1) if index % 2 else (1, 0):
            times[which].append(_seconds((first, second)[which], runs, clock))
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return Turns(statistics.median(times[0]), statistics.median(times[1]), ratio)


def _seconds(work: Callable[[], object], runs: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(runs):
        work()
    return (clock() - begin) / runs


def session(path: Path, threads: int = 0, optimized: Path | None = None) -> ort.InferenceSession:
    """Load `path` at the default level; write the optimized graph to `optimized` if given."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def resident(path: Path, runs: int = 3) -> float:
    """Return the median resident memory, in bytes, of a fresh process that has loaded `path`."""
    return 1024 * statistics.median(float(program(["-c", _RESIDENT, path])) for _ in range(runs))
