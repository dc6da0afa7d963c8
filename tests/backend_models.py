"""Every model of onnx.backend.test through the program: emitted and verified, or refused with a reason.

    python tests/backend_models.py [--only PATTERN] [--every N] [--jobs 2]

Each runs twice: as it is, through the command line on synthetic samples; and, where it has a layer's operator, with all
its inputs but one made constants (most node tests feed the weight), on its own data. A fault is a traceback, a death by
a signal, a run of over a minute, an output that ONNX Runtime does not load, or one under LEAST dB on that data.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

import rdoq_onnx
from rdoq_onnx import cli
from rdoq_onnx.model.protos import all_nodes
from rdoq_onnx.observation.distortion import sqnr_db

SECONDS = 60
LEAST = 15.0  # dB of the outputs at 8 bits, on a handful of numbers
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM", "GRU", "RNN", "Einsum"}

Outcome = tuple[str, str]  # what happened, and what the program said
Case = tuple[str, Callable[[], Outcome]]


def cases() -> Iterator[Case]:
    """(name, run) of every case, a few thousand of them."""
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for found in load_model_tests(kind=kind):
            path = Path(found.model_dir) / "model.onnx"
            yield f"{kind}/{found.name}", lambda path=path: through_the_command_line(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        nodes = collect_testcases(None)
    for case in nodes:
        model = case.model
        yield f"node/{case.name}", lambda model=model: through_the_command_line(model.SerializeToString())
        if WEIGHTED & {n.op_type for n in all_nodes(model.graph)}:
            inputs, outputs = case.data_sets[0]
            for kept in range(min(len(model.graph.input), 2)):
                yield (
                    f"constant/{case.name}/{kept}",
                    lambda model=model, i=inputs, o=outputs, kept=kept: on_its_own_data(model, i, o, kept),
                )


def through_the_command_line(data: bytes) -> Outcome:
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        source.write_bytes(data)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                cli.main([str(source), str(target), "--effort", "fast", "--threads", "1", "--quiet"])
        except SystemExit as stop:
            if stop.code:
                return f"exit {stop.code}", said.getvalue().strip()
        ort.InferenceSession(target.read_bytes(), providers=["CPUExecutionProvider"])
    return "emitted", ""


def on_its_own_data(model: ModelProto, inputs: list[Any], outputs: list[Any], kept: int) -> Outcome:
    frozen = ModelProto()
    frozen.CopyFrom(model)
    names = [i.name for i in model.graph.input]
    feeds = {names[kept]: inputs[kept]}
    for k, (name, value) in enumerate(zip(names, inputs, strict=False)):
        if k != kept and isinstance(value, np.ndarray):
            frozen.graph.initializer.append(numpy_helper.from_array(value, name))
    del frozen.graph.input[:]
    frozen.graph.input.append(model.graph.input[kept])
    try:
        result = rdoq_onnx.quantize(frozen, [feeds] * 6, bits=8, effort="fast", threads=1)
    except rdoq_onnx.RdoqError as error:
        return f"exit {error.exit_code}", str(error)
    session = ort.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    signal_power = noise = 0.0
    for got, expected in zip(session.run(None, feeds), outputs, strict=True):
        if np.asarray(expected).dtype.kind == "f":
            assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
            signal_power += float(np.square(expected, dtype=np.float64).sum())
            noise += float(np.square(got - expected, dtype=np.float64).sum())
    found = sqnr_db(signal_power, noise)
    return ("emitted" if found >= LEAST else "FAULT wrong output"), f"{found:.1f} dB"


def outcomes(todo: list[Case], jobs: int) -> Iterator[tuple[str, Outcome]]:
    """Each case in a process of its own."""
    waiting, running, numbers = iter(todo), {}, itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            while len(running) < jobs and (case := next(waiting, None)) is not None:
                file = Path(folder, str(next(numbers)))
                file.touch()
                process = os.fork()
                if process == 0:
                    _alone(case[1], file)
                running[process] = (case[0], file, time.monotonic())
            if not running:
                return
            time.sleep(0.005)
            for process, (name, file, since) in list(running.items()):
                late = time.monotonic() - since > SECONDS
                if late:
                    os.kill(process, signal.SIGKILL)
                done, status = os.waitpid(process, 0 if late else os.WNOHANG)
                if done:
                    del running[process]
                    text = file.read_text()
                    died = "FAULT hang" if late else f"FAULT died with status {status}"
                    yield name, tuple(json.loads(text)) if text else (died, "")


def _alone(run: Callable[[], Outcome], file: Path) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        outcome = run()
    except BaseException:
        outcome = "FAULT traceback", traceback.format_exc()[-3000:]
    file.write_text(json.dumps(outcome))
    os._exit(0)


def main() -> int:
    options = argparse.ArgumentParser(description="The models of onnx.backend.test through the program.")
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--every", type=int, default=1, help="every N-th of them")
    options.add_argument("--jobs", type=int, default=2)
    given = options.parse_args()
    todo = [c for c in cases() if given.only in c[0]][:: given.every]
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    for name, (outcome, said) in outcomes(todo, given.jobs):
        counts[name.split("/")[0], outcome] += 1
        if outcome.startswith("FAULT"):
            sys.stdout.write(f"{name}: {outcome}\n{said}\n")
        elif outcome != "emitted":
            reasons[re.sub(r"'[^']*'", "…", said)[:140]] += 1
    for reason, count in reasons.most_common(30):
        sys.stdout.write(f"{count:5} refused: {reason}\n")
    for (kind, outcome), count in sorted(counts.items()):
        sys.stdout.write(f"{count:5} {kind}: {outcome}\n")
    return int(any(outcome.startswith("FAULT") for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
