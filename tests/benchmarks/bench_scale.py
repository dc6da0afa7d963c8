"""The cost of many samples and of several budgets: peak memory, and a second run on the curves of the first.

    python tests/benchmarks/bench_scale.py [--only TABLE] [--model MODEL]

Tables: memory, curves. README.md describes each, with its bound.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench_speed import Subject, subjects, verdict
from tables import parser, write

COUNTS = (64, 1024)
MEMORY = 1.1  # bound on the peak with many samples over that with few
SECOND = 0.15  # bound on the seconds of the second run over those of the first
COLUMNS = (-15, -30, 11, 11, 9, -8)


def memory_rows(subject: Subject, folder: Path) -> Iterator[tuple[str, ...]]:
    """Compare peaks of runs on 64 and on 1,024 samples, the available ones repeated."""
    repeated = folder / "many.npz"
    with np.load(subject.calibration) as arrays:
        np.savez(repeated, **{name: _repeated(a, COUNTS[1]) for name, a in arrays.items()})
    peaks = [run(subject, repeated, folder, "--samples", str(count))[1] for count in COUNTS]
    ratio = peaks[1] / peaks[0]
    few, many = (f"{peak / 2**20:.0f} MiB" for peak in peaks)
    yield subject.name, f"peak, {COUNTS[0]} and {COUNTS[1]} samples", few, many, f"{ratio:.3f}", verdict(ratio, MEMORY)


def curves_rows(subject: Subject, folder: Path) -> Iterator[tuple[str, ...]]:
    """Compare a run that measures with one at other bits that starts from its curves."""
    options = "--samples", str(subject.samples), "--curves", str(folder / "curves.npz")
    first, second = (run(subject, subject.calibration, folder, *options, bits=bits)[0] for bits in (4, 3))
    times = f"{first:.1f} s", f"{second:.1f} s", f"{second / first:.3f}"
    yield subject.name, f"4 bits, then 3, {subject.samples} samples", *times, verdict(second / first, SECOND)


def run(subject: Subject, calibration: Path, folder: Path, *options: str, bits: int = 4) -> tuple[float, int]:
    """Run the command line at `bits` weight bits and 8 activation bits; return (seconds, peak in bytes)."""
    command = [
        sys.executable,
        "-m",
        "rdoq_onnx",
        subject.path,
        folder / "out.onnx",
        "--quiet",
        "--calibration",
        calibration,
        "--weight-bits",
        bits,
        "--activation-bits",
        8,
        *options,
    ]
    begin = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], cwd=Path(__file__).parent)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{subject.name}: the run failed")
    return time.perf_counter() - begin, 1024 * usage.ru_maxrss


def _repeated(values: np.ndarray, count: int) -> np.ndarray:
    return values[np.arange(count) % len(values)]


TABLES: dict[str, Callable[[Subject, Path], Iterator[tuple[str, ...]]]] = {
    "memory": memory_rows,
    "curves": curves_rows,
}


def main() -> None:
    """Print the selected tables; that of memory needs samples in one file."""
    available = subjects()
    args = parser(__doc__, TABLES, available).parse_args()
    write(("model", "what", "first", "second", "ratio", ""), COLUMNS)
    for table in args.only or TABLES:
        for name in args.model or available:
            if table == "memory" and available[name].calibration.suffix != ".npz":
                continue
            with tempfile.TemporaryDirectory() as folder:
                for cells in TABLES[table](available[name], Path(folder)):
                    write(cells, COLUMNS)


if __name__ == "__main__":
    main()
