"""Whether a GPU allocates as the CPU does: widths and fidelity of both on real models, batches from free memory.

    python tests/device/same_allocation.py [--provider cuda|cpu|noise] [--samples N] [--model NAME]

With cpu, the CPU stands in: sums are computed inside the graph there, too, of fewer samples of the larger models. With
noise, the second run is the first with relative errors of 1e-7 in the second moments of the layers' inputs: what
rounding in float32 changes at least, as compensated rounding passes a last bit on to all integers behind it. The shares
allowed below are more than that, but not much.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import rdoq_onnx
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.curves import steps
from rdoq_onnx.system.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]
ZOO = Path(os.environ.get("ZOO", ROOT.parent / "shared" / "zoo"))
MINILM = Path(os.environ.get("MINILM", "/tmp/minilm"))  # made by the zoo's minilm/make.py
DECIBELS = 0.5  # by which the output SQNR may fall
FREE = 1 << 30  # bytes of the memory that the CPU stands in with
NOISE = 1e-7


@dataclass(frozen=True)
class Subject:
    """A model with its samples. fewer: samples if the CPU stands in; share: of channels that may get another width."""

    model: Path
    calibration: Path
    fewer: int
    share: float


SUBJECTS = {
    "digits_cnn": Subject(ROOT / "models/digits_cnn.onnx", ROOT / "models/digits_calib.npz", 48, 0.05),
    "resnet20": Subject(ZOO / "cifar10/resnet20.onnx", ZOO / "cifar10/calib.npz", 48, 0.05),
    "mobilenet_v2": Subject(ZOO / "imagenet/mobilenet_v2.onnx", ZOO / "imagenet/calib", 12, 0.25),
    "minilm": Subject(MINILM / "model.onnx", MINILM / "calib.npz", 8, 0.05),
}


def quantized(subject: Subject, provider: str, samples: int) -> tuple[Any, float]:
    """Return the report of a run, and its seconds."""
    begin = time.perf_counter()
    result = rdoq_onnx.quantize(
        subject.model,
        subject.calibration,
        weight_bits=4,
        activation_bits=8,
        effort="fast",
        samples=samples,
        provider=provider,
    )
    return result.report, time.perf_counter() - begin


@contextlib.contextmanager
def on_cpu(provider: str) -> Iterator[None]:
    """Have a run on the CPU do as on a GPU, or as on another CPU with noise."""
    if provider == "cpu":
        with patch.object(Runtime, "in_graph", True), patch.object(Runtime, "memory", lambda self: FREE):
            yield
    else:
        collect, rng = steps.collect, np.random.default_rng(0)

        def noisy(moments: Moments) -> Moments:
            errors = NOISE * rng.standard_normal(moments.covariance.shape)
            return replace(moments, covariance=moments.covariance * (1 + (errors + errors.swapaxes(1, 2)) / 2))

        with patch.object(steps, "collect", lambda *args: tuple(map(noisy, collect(*args)))):
            yield


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--provider", default="cuda", choices=("cuda", "cpu", "noise"))
    options.add_argument("--samples", type=int)
    options.add_argument("--model", action="append", choices=SUBJECTS)
    given = options.parse_args()
    missed = []
    for name in given.model or SUBJECTS:
        subject = SUBJECTS[name]
        if not (subject.model.exists() and subject.calibration.exists()):
            sys.stdout.write(f"{name}: not here\n")
            continue
        samples = given.samples or (48 if given.provider == "cuda" else subject.fewer)
        host, seconds = quantized(subject, "cpu", samples)
        if given.provider == "cuda":
            device, others = quantized(subject, "cuda", samples)
        else:
            with on_cpu(given.provider):
                device, others = quantized(subject, "cpu", samples)
        bits = [np.concatenate([layer.bits for layer in report.layers]) for report in (host, device)]
        share, loss = float(np.mean(bits[0] != bits[1])), host.sqnr_db - device.sqnr_db
        verdict = "ok" if share <= subject.share and loss <= DECIBELS else "MISSED"
        missed += [name] * (verdict != "ok")
        sys.stdout.write(
            f"{name}: {100 * share:.1f} % of {len(bits[0])} channels differ, {host.sqnr_db:.2f} -> {device.sqnr_db:.2f}"
            f" dB, {seconds:.0f} -> {others:.0f} s: {verdict}\n"
        )
        sys.stdout.flush()
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
