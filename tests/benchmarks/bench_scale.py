"""How time and memory of a run grow, what many samples cost, and a second run on the curves of the first.

    python tests/benchmarks/bench_scale.py [--only TABLE] [--family decoder|encoder] [--weights 10,20,40] [--steps]
    python tests/benchmarks/bench_scale.py --only memory --only curves [--model MODEL]

Tables: weights, layers, width, samples, tokens, memory, curves. README.md describes each, with its bound.
"""

import argparse
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from bench_speed import Subject, subjects, verdict
from growth import COLUMNS, FIGURES, Point, Run, growth_rows, run, step_rows
from judging import FailedError
from networks import FAMILIES
from shapes import Decoder, Encoder, with_layers, with_width
from tables import parser, write_markdown

COUNTS = (64, 1024)
MEMORY = 1.1  # bound on the peak with many samples over that with few
SECOND = 0.15  # bound on the seconds of the second run over those of the first
SETTING = ("--activation-bits", "8", "--weight-bits")  # of the tables memory and curves
SIZES = {  # what each growing table varies, by default; weights in millions
    "weights": [10, 20, 40],
    "layers": [2, 4, 8, 16],
    "width": [128, 256, 512],
    "samples": [8, 16, 32],
    "tokens": [32, 64, 128],
}
UNITS = {"weights": "millions of weights", "layers": "layers", "width": "channels, multiples of 64"}


def points(table: str, family: str, args: argparse.Namespace) -> list[Point]:
    """Make the points of one table: one size grows, the others stay those of the base network."""
    base = FAMILIES[family](args.base * 10**6)
    shapes: dict[str, Callable[[int], Decoder | Encoder]] = {
        "weights": lambda n: FAMILIES[family](n * 10**6),
        "layers": lambda n: with_layers(base, n),
        "width": lambda n: with_width(base, n),
    }
    made = []
    for size in getattr(args, table):
        shape = shapes[table](size) if table in shapes else base
        samples, tokens = (size if table == t else getattr(args, f"fixed_{t}") for t in ("samples", "tokens"))
        made.append(Point(shape.weights if table == "weights" else size, shape, samples, tokens))
    return made


def grow(table: str, args: argparse.Namespace) -> list[str]:
    """Print the tables of one size for each family; return what failed."""
    missed: list[str] = []
    options = "--weight-bits", str(args.bits), "--activation-bits", args.activation_bits, *shlex.split(args.options)
    for family in args.family or FAMILIES:
        done: dict[Point, Run] = {}
        rows = growth_rows(points(table, family, args), options, done, missed)
        write_markdown(f"Growth over {table}, {family}s, `{shlex.join(options)}`:", (*COLUMNS, *FIGURES), rows)
        if args.steps:
            head = "step, seconds", *(str(p.size) for p in done), "exponent"
            write_markdown(f"Steps over {table}, {family}s:", head, step_rows(done))
    return missed


def memory_row(subject: Subject, folder: Path) -> tuple[str, ...]:
    """Compare peaks of runs on 64 and on 1,024 samples, the available ones repeated. Raises FailedError."""
    repeated = folder / "many.npz"
    with np.load(subject.calibration) as arrays:
        np.savez(repeated, **_repeated(dict(arrays), COUNTS[1]))
    peaks = [run(subject.path, repeated, folder, *SETTING, "4", "--samples", str(count)).peak for count in COUNTS]
    ratio = peaks[1] / peaks[0]
    few, many = (f"{peak / 2**20:.0f} MiB" for peak in peaks)
    return subject.name, f"peak, {COUNTS[0]} and {COUNTS[1]} samples", few, many, f"{ratio:.3f}", verdict(ratio, MEMORY)


def curves_row(subject: Subject, folder: Path) -> tuple[str, ...]:
    """Compare a run that measures with one at other bits that starts from its curves. Raises FailedError."""
    options = "--samples", str(subject.samples), "--curves", str(folder / "curves.npz")
    runs = [run(subject.path, subject.calibration, folder, *SETTING, bits, *options) for bits in ("4", "3")]
    first, second = (r.seconds for r in runs)
    times = f"{first:.1f} s", f"{second:.1f} s", f"{second / first:.3f}"
    return subject.name, f"4 bits, then 3, {subject.samples} samples", *times, verdict(second / first, SECOND)


def _repeated(arrays: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Repeat what has a row for each sample, unlike mean and std."""
    rows = max(map(len, arrays.values()))
    return {name: a[np.arange(count) % rows] if len(a) == rows else a for name, a in arrays.items()}


COMPARED: dict[str, Callable[[Subject, Path], tuple[str, ...]]] = {"memory": memory_row, "curves": curves_row}


def compare(table: str, models: Sequence[Subject]) -> list[str]:
    """Print a table of two runs for each model; return what failed."""
    missed: list[str] = []

    def rows() -> Iterator[tuple[str, ...]]:
        for subject in models:
            if table == "memory" and subject.calibration.suffix != ".npz":
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    yield COMPARED[table](subject, Path(folder))
            except FailedError as error:
                missed.append(str(error))
                yield subject.name, str(error), "", "", "", "FAILED"

    write_markdown(f"Two runs, {table}:", ("model", "what", "first", "second", "ratio", ""), rows())
    return missed


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    """Print the selected tables."""
    available = subjects()
    arguments = parser(__doc__, [*SIZES, *COMPARED], available)
    arguments.add_argument("--family", action="append", choices=list(FAMILIES), help="may be repeated")
    for table, sizes in SIZES.items():
        shown = ",".join(map(str, sizes))
        arguments.add_argument(
            f"--{table}", type=numbers, default=sizes, metavar="LIST", help=f"{UNITS.get(table, table)}; {shown}"
        )
    arguments.add_argument("--base", type=int, default=10, metavar="N", help="millions of weights of other tables; 10")
    arguments.add_argument("--fixed-samples", type=int, default=16, metavar="N", help="samples of other tables; 16")
    arguments.add_argument("--fixed-tokens", type=int, default=64, metavar="N", help="tokens of other tables; 64")
    arguments.add_argument("--bits", default="4", help="of weights; 4")
    arguments.add_argument("--activation-bits", default="none", help="1 to 8, or none")
    arguments.add_argument("--options", default="", help="further options of rdoq-onnx, as --options='--effort fast'")
    arguments.add_argument("--steps", action="store_true", help="also print the seconds of each step")
    args = arguments.parse_args()
    missed = []
    for table in args.only or [*SIZES, *COMPARED]:
        chosen = [available[name] for name in args.model or available]
        missed += grow(table, args) if table in SIZES else compare(table, chosen)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
