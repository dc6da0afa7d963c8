"""Judge an emitted file against its float original, with code independent of the quantizer."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from targets import EVAL, Model

AUDITED = 64  # samples that audit.py runs activations on


class FailedError(Exception):
    """A program failed; the message is its last line of output."""


def program(arguments: Sequence[str | Path]) -> str:
    """Run a Python program and return its output. Raises FailedError if it exits with an error."""
    # In the root, -m would find the source folder, which lacks passes/, before the installed package.
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def judge_by_eval(output: Path, report: Path, model: Model, limit: int) -> dict[str, Any]:
    """Return the figures of score.py and audit.py."""
    del report
    score = [EVAL / "score.py", output, model.path, "--data", model.test, "--limit", str(limit), "--json"]
    audited = str(min(limit or AUDITED, AUDITED))
    audit = [EVAL / "audit.py", output, "--data", model.test, "--original", model.path, "--limit", audited, "--json"]
    return json.loads(program(score)) | json.loads(program(audit))


def judge(output: Path, report: Path, model: Model, limit: int) -> dict[str, Any]:
    """Compute the same figures by ONNX Runtime on the test images; bits are taken from the run's report."""
    with np.load(model.test) as data:
        count = len(data["y"])
        rows = np.linspace(0, count - 1, min(limit or count, count)).astype(int)
        images, labels = (data["x"][rows].astype(np.float32) / 255 - data["mean"]) / data["std"], data["y"][rows]
    paths = {"float": model.path, "quantized": output}
    values = {key: logits(path, images.transpose(0, 3, 1, 2)) for key, path in paths.items()}
    first = {key: v.argmax(axis=1) for key, v in values.items()}
    noise = np.square(values["float"] - values["quantized"]).sum()
    bits = json.loads(report.read_text())["bits"]
    return {
        "sqnr_db": float(10 * np.log10(np.square(values["float"]).sum() / max(noise, 1e-30))),
        "top1": {key: 100 * float((v == labels).mean()) for key, v in first.items()},
        "agreement": 100 * float((first["float"] == first["quantized"]).mean()),
        "bytes": {key: path.stat().st_size for key, path in paths.items()},
        "weight_bits": bits["weights"],
        "activation_bits": bits["activations"],
    }


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the first output of a model with one input, in float64."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images)})[0].astype(np.float64)
