"""Random combinations of all options on small models: an exit code that is documented, and never a traceback.

    python tests/fuzz_options.py --count 5000 --seed 0 [--jobs 2]

Draws models and options from `tests/option_strategies.py` and runs the command line on each in a process apart. A fault
is a traceback, an exit code other than 0, 2, 3 and 4, a death by a signal, a run of over a minute, an error that does
not end in one line, a sound model that is called unsound, an output that is touched though the run failed, or one that
ONNX Runtime does not load. Prints
counts, and faults with the number that makes them again: `--only NUMBER`.
"""

import argparse
import contextlib
import io
import re
import sys
import traceback
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import HealthCheck, Phase, given, settings

sys.path.append(str(Path(__file__).parent.parent))  # for `tests`; behind the installed package

from rdoq_onnx import cli
from rdoq_onnx.cluster.process import in_folder
from tests import fuzzing
from tests.conftest import random_feeds
from tests.option_strategies import MODELS, Combination, combinations, model_of

CODES = (0, 2, 3, 4)
BEFORE = b"what was here before"


def prepare(folder: Path, kind: str) -> None:
    """Lay the model of this kind into `folder`, with samples of it, and a file where its output will be."""
    model = model_of(kind)
    onnx.save(model, folder / "in.onnx")
    (folder / "out.onnx").write_bytes(BEFORE)
    (folder / "costs.csv").write_text("layer,weight_bits,activation_bits,cost_us\n.*,0,*,0\n.*,1-4,*,3\n.*,8,*,9\n")
    feeds = random_feeds(model, free=8)
    rows = {n: np.concatenate([v] * 4) if v.shape[:1] == (2,) else v for n, v in feeds.items()}
    np.savez(folder / "samples.npz", **{n: v % 7 if v.dtype.kind == "i" else v for n, v in rows.items()})


def run(combination: Combination, folder: Path) -> tuple[str, str]:
    """(outcome, what it said) of the command line in `folder`, which `prepare` filled: "exit N", or a fault."""
    arguments, target = ["in.onnx", "out.onnx", *combination.options], folder / "out.onnx"
    out, said, code = io.StringIO(), io.StringIO(), 0
    try:
        with in_folder(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            cli.main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        return "FAULT traceback", f"{combination}\n{traceback.format_exc()}"
    text = f"{combination}\n{said.getvalue()}"
    if code not in CODES:
        return f"FAULT exit {code}", text
    if code == 0:
        fault = _unloadable(target, combination)
        return (f"FAULT {fault}", text) if fault else ("exit 0", text)
    errors = said.getvalue().strip().splitlines()
    if not errors or not errors[-1].startswith("rdoq-onnx: error: ") or "Traceback" in said.getvalue():
        return "FAULT no error line", text
    if re.search("ONNX Runtime (refuses|could not)|not valid ONNX", errors[-1]):
        return "FAULT a sound model is refused", text
    if target.read_bytes() != BEFORE:
        return f"FAULT exit {code} with an output", text
    return f"exit {code}", text


def _unloadable(target: Path, combination: Combination) -> str:
    """What is wrong with the output of a run that succeeded."""
    if not {"--dry-run", "--help", "--shard"}.isdisjoint(combination.options):
        return "" if target.read_bytes() == BEFORE else "a run without output that writes"
    try:
        ort.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:
        return f"output does not load: {error}"
    return ""


def drawn(count: int, seed: int) -> list[Combination]:
    """The first `count` combinations of this seed."""
    found: list[Combination] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count, phases=[Phase.generate], database=None, suppress_health_check=[*HealthCheck], deadline=None
    )
    @given(combinations())
    def collect(combination: Combination) -> None:
        found.append(combination)

    collect()
    return found[:count]


def main() -> int:
    options = argparse.ArgumentParser(description="Fuzz the command line with combinations of options.")
    options.add_argument("--count", type=int, default=5000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--only", type=int)
    given = options.parse_args()
    combinations_ = drawn(given.count, given.seed)

    def case(number: int, folder: Path) -> tuple[str, str]:
        prepare(folder, combinations_[number].model)
        return run(combinations_[number], folder)

    numbers = range(len(combinations_)) if given.only is None else range(given.only, given.only + 1)
    found = fuzzing.outcomes(case, numbers, given.jobs if len(numbers) > 1 else 1)
    what = f"combinations on {len(MODELS)} models, seed {given.seed}"
    return fuzzing.counted(what, found, all_of_them=len(numbers) == 1)


if __name__ == "__main__":
    sys.exit(main())
