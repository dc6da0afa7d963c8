"""The results of the command line on real models: bits, fidelity, size and time.

    python tests/benchmarks/bench_quality.py [--only MODEL] [--settings W4A8,...] [--effort fast|default|best]
                                             [--limit N] [--gains]

A setting such as W4A8 gives the average bits of weights and activations; W4 keeps activations in float, W4A8u gives
every weight channel the same width (`--widths 4`). Models: those of models/, and of the zoo if ../shared/zoo and
../shared/eval exist. Each file is judged on the test samples, independently of the code that made it: by score.py and
audit.py of ../shared/eval, else by ONNX Runtime alone, with the bits that the run reports.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from judging import FailedError, judge, judge_by_eval, program
from tables import write
from targets import EVAL, FLOORS, ROOT, Floor, Model, models

EFFORTS = ("fast", "default", "best")
FIGURES = ("W bits", "A bits", "SQNR dB", "top-1", "float", "agree %", "file kB", "seconds")
SIZES = (7, 7, 8, 7, 7, 8, 9, 8)


@dataclass(frozen=True)
class Case:
    """One run of the command line."""

    model: Model
    setting: str
    effort: str
    measure: str = "taylor"

    def options(self) -> list[str]:
        weights, activations, uniform = parse(self.setting)
        options = ["--weight-bits", weights, "--activation-bits", activations or "none"]
        options += ["--widths", weights] if uniform else []
        options += ["--effort", self.effort] if self.effort != "default" else []
        return options + (["--measure", self.measure] if self.measure != "taylor" else [])


def parse(setting: str) -> tuple[str, str | None, bool]:
    """Parse W4A8u into ("4", "8", True); without A activations are float, u means uniform weights."""
    parts = re.fullmatch(r"W(\d+(?:\.\d+)?)(?:A(\d+(?:\.\d+)?))?(u?)", setting)
    if not parts:
        raise argparse.ArgumentTypeError(f"{setting!r} is not a setting; give for example W4A8, W4 or W4A8u")
    return parts[1], parts[2], bool(parts[3])


def parse_settings(text: str) -> tuple[str, ...]:
    settings = tuple(text.split(","))
    for setting in settings:
        parse(setting)
    return settings


@cache
def measured(case: Case, folder: Path, limit: int) -> dict[str, Any]:
    """Run the command line and judge its file; return figures by name. Raises FailedError."""
    output, report = folder / "quantized.onnx", folder / "report.json"
    calibration = ["--calibration", case.model.calibration]
    arguments = [case.model.path, output, *calibration, "--json", report, "--quiet", *case.options()]
    begin = time.perf_counter()
    program(["-m", "rdoq_onnx", *arguments])
    seconds = time.perf_counter() - begin
    judged = judge_by_eval if EVAL.is_dir() else judge
    return {"run_seconds": seconds} | judged(output, report, case.model, limit)


def line(case: Case, results: dict[str, Any], floor: Floor | None) -> tuple[str, ...]:
    """Format a row of the first table."""
    bound = "" if floor is None else floor.text()
    kept = "" if floor is None else "MISSED" if floor.missed(results) else "ok"
    return case.model.name, case.setting, case.effort, *figures(results), bound, kept


def figures(results: dict[str, Any]) -> tuple[str, ...]:
    """Format the columns common to both tables."""
    bits = results["activation_bits"]
    return (
        f"{results['weight_bits']:.3f}",
        "float" if bits is None else f"{bits:.3f}",
        f"{results['sqnr_db']:.2f}",
        f"{results['top1']['quantized']:.2f}",
        f"{results['top1']['float']:.2f}",
        f"{results['agreement']:.2f}",
        f"{results['bytes']['quantized'] / 1000:.1f}",
        f"{results['run_seconds']:.1f}",
    )


def variants(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield the setting with one more technique each time, as far as the command line can switch them."""
    weights, _, _ = parse(case.setting)
    mixed = replace(case, setting=case.setting.rstrip("u"))
    if "." not in weights:
        yield "uniform weights", replace(mixed, setting=mixed.setting + "u", effort="fast")
    yield from ((f"mixed, {effort}", replace(mixed, effort=effort)) for effort in EFFORTS)
    if ROOT / "models" in case.model.path.parents:
        yield "exact curves", replace(mixed, effort="fast", measure="probe")


def quality_table(cases: Iterable[Case], folder: Path, limit: int) -> tuple[int, int]:
    """Print the first table; return (floors missed, runs failed)."""
    sizes = (-14, -8, -8, *SIZES, -18, -6)
    write(("model", "setting", "effort", *FIGURES, "floor", ""), sizes)
    missed = failed = 0
    for case in cases:
        floor = FLOORS.get((case.model.name, case.setting))
        try:
            cells = line(case, measured(case, folder, limit), floor)
        except FailedError as error:
            failed += 1
            write((case.model.name, case.setting, case.effort, f"failed: {error}"), (-14, -8, -8, 0))
            continue
        missed += cells[-1] == "MISSED"
        write(cells, sizes)
    return missed, failed


def gains_table(case: Case, folder: Path, limit: int) -> None:
    """Print the second table: the SQNR gain of each technique over the first variant."""
    sizes = (-16, *SIZES, 8)
    write(("variant", *FIGURES, "gain dB"), sizes)
    first = None
    for name, variant in variants(case):
        try:
            results = measured(variant, folder, limit)
        except FailedError as error:
            write((name, f"failed: {error}"), (-16, 0))
            continue
        first = results["sqnr_db"] if first is None else first
        write((name, *figures(results), f"{results['sqnr_db'] - first:+.2f}"), sizes)


def chosen_cases(args: argparse.Namespace, available: list[Model]) -> list[Case]:
    """Return the selected runs, each at the effort of its floor unless one is given."""
    picked = [m for m in available if not args.only or m.name in args.only]
    return [
        Case(model, setting, args.effort or FLOORS.get((model.name, setting), Floor()).effort)
        for model in picked
        for setting in args.settings or model.settings
    ]


def arguments(available: list[Model]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[m.name for m in available], help="may be repeated")
    parser.add_argument("--settings", type=parse_settings, metavar="W4A8,...", help="instead of each model's own")
    parser.add_argument("--effort", choices=EFFORTS, help="for all runs; default: the effort of each floor")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="test samples; 0 for all")
    parser.add_argument("--gains", action="store_true", help="also the gain of each technique, for one run")
    args = parser.parse_args()
    if args.gains and len(chosen_cases(args, available)) != 1:
        parser.error("--gains takes one run: give one --only and one of --settings")
    return args


def main() -> int:
    """Print the tables; 1 if a run failed."""
    available = models()
    args = arguments(available)
    cases = chosen_cases(args, available)
    with tempfile.TemporaryDirectory() as folder:
        missed, failed = quality_table(cases, Path(folder), args.limit)
        note = f"; on {args.limit} test samples, but floors apply to all" if args.limit else ""
        sys.stdout.write(f"{missed} floors missed, {failed} runs failed{note}\n")
        if args.gains:
            sys.stdout.write("\n")
            gains_table(cases[0], Path(folder), args.limit)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
