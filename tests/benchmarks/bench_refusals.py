"""Time and memory to refuse hostile models, and how time grows with the length of a chain.

    python tests/benchmarks/bench_refusals.py

Each runs through the command line in a process of its own, forked after the imports. `MB` is the memory beyond them.
"""

import contextlib
import io
import itertools
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tables import write

sys.path.insert(0, str(Path(__file__).parents[2]))

from rdoq_onnx import cli
from rdoq_onnx.system.runtime import Runtime
from tests.hostile_models import CASES

SIZES = (-34, 4, 8, 7, -110)
CHAINS = (5_000, 10_000, 20_000)


def chain(length: int) -> ModelProto:
    """Make a chain of alternating MatMul and Relu."""
    tensors = [f"t{k}" for k in range(length + 1)]
    nodes = [
        helper.make_node("Relu", [a], [b]) if k % 2 else helper.make_node("MatMul", [a, f"w{k}"], [b])
        for k, (a, b) in enumerate(itertools.pairwise(tensors))
    ]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w{k}") for k in range(0, length, 2)]
    ends = [helper.make_tensor_value_info(t, TensorProto.FLOAT, ["N", 4]) for t in (tensors[0], tensors[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def refused(model: ModelProto, folder: Path, first_session: bool = False) -> tuple[int, float, float, str]:
    """Return exit code, seconds, MB beyond the imports, and the error; first_session: stop at the first session."""
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        if first_session:
            Runtime.session = lambda *_: sys.exit(0)  # type: ignore[assignment,method-assign,return-value]
        errors, start, code = io.StringIO(), time.perf_counter(), 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.redirect_stderr(errors):
            try:
                cli.main([str(folder / "in.onnx"), str(folder / "out.onnx"), "--effort", "fast", "--quiet"])
            except SystemExit as stop:
                code = int(stop.code or 0)
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writing, f"{code}\t{seconds}\t{grown}\t{errors.getvalue()[:3000]}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        code, seconds, grown, line = pipe.read().split("\t", 3)
    os.waitpid(process, 0)
    return int(code), float(seconds), float(grown), line.strip().removeprefix("rdoq-onnx: error: ")


def main() -> None:
    write(("model", "exit", "seconds", "MB", "error"), SIZES)
    for name, (_, make) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            code, seconds, grown, line = refused(make(Path(folder)), Path(folder))
            write((name, str(code), f"{seconds:.2f}", f"{grown:.0f}", line.replace(folder + "/", "")[:110]), SIZES)
    write(("chain up to the first session", "", "seconds", "MB", ""), SIZES)
    for length in CHAINS:
        with tempfile.TemporaryDirectory() as folder:
            _, seconds, grown, _ = refused(chain(length), Path(folder), first_session=True)
            write((f"{length:,} nodes", "", f"{seconds:.2f}", f"{grown:.0f}", ""), SIZES)


if __name__ == "__main__":
    main()
