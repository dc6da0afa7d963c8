"""Estimates of a dry run beside the run: seconds and peak memory.

    python tests/benchmarks/bench_estimates.py [--model NAME] [--settings W4,W8A8] [--effort fast,default]
    python tests/benchmarks/bench_estimates.py --files MODEL CALIBRATION [--samples N]

README.md describes the columns.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench_speed import Subject, subjects
from growth import run
from judging import FailedError
from tables import write_markdown

from rdoq_onnx.config import Config
from rdoq_onnx.estimate.dry_run import dry_run

SECONDS, MEMORY = 2.0, 1.5  # bounds on the factor between estimate and run
HEAD = ("model", "setting", "effort", "dry run s", "estimate s", "run s", "cpu s", "ratio", "")
HEAD += ("estimate MB", "peak MB", "ratio", "", "scratch MB")


def row(subject: Subject, setting: str, effort: str) -> tuple[str, ...]:
    """Make a dry run and a run. Raises FailedError."""
    weights, activations = re.fullmatch(r"W(\d)(?:A(\d))?", setting).groups()
    config = Config(
        weight_bits=float(weights),
        activation_bits=float(activations) if activations else None,
        effort=effort,
        samples=subject.samples or None,
    )
    begin = time.perf_counter()
    foretold = dry_run(subject.path, subject.calibration, config)
    took = time.perf_counter() - begin
    options = ["--weight-bits", weights, "--activation-bits", activations or "none", "--effort", effort]
    options += ["--samples", str(subject.samples)] if subject.samples else []
    with tempfile.TemporaryDirectory() as folder:
        made = run(subject.path, subject.calibration, Path(folder), *options)
    guess, memory = sum(foretold.seconds.values()), foretold.space.memory
    times = f"{took:.1f}", f"{guess:.1f}", f"{made.seconds:.1f}", f"{made.processor:.1f}"
    sizes = f"{memory / 1e6:.0f}", f"{made.peak / 1e6:.0f}"
    judged = *times, *_ratio(guess / made.seconds, SECONDS), *sizes, *_ratio(memory / made.peak, MEMORY)
    return subject.name, setting, effort, *judged, f"{foretold.space.scratch / 1e6:.0f}"


def _ratio(ratio: float, bound: float) -> tuple[str, str]:
    return f"{ratio:.2f}", "ok" if 1 / bound <= ratio <= bound else "MISSED"


def main() -> None:
    """Print the table of the selected models."""
    available = subjects()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", action="append", choices=list(available), help="may be repeated")
    arguments.add_argument("--files", action="append", nargs=2, type=Path, metavar=("MODEL", "CALIBRATION"))
    arguments.add_argument("--samples", type=int, default=0, metavar="N", help="of --files; all")
    arguments.add_argument("--settings", default="W4,W8A8", help="W4,W8A8")
    arguments.add_argument("--effort", default="fast,default", help="fast,default")
    args = arguments.parse_args()
    given = [Subject(path.parent.name, path, data, args.samples) for path, data in args.files or ()]
    models = given or [available[name] for name in args.model or available]
    missed = []

    def rows() -> Iterator[tuple[str, ...]]:
        for subject in models:
            for setting in args.settings.split(","):
                for effort in args.effort.split(","):
                    try:
                        yield row(subject, setting, effort)
                    except FailedError as error:
                        missed.append(str(error))
                        yield subject.name, setting, effort, str(error)

    write_markdown("Estimates and runs:", HEAD, rows())
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
