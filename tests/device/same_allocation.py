"""Whether a GPU allocates as the CPU does: widths and fidelity of both on real models, batches from free memory.

    python tests/device/same_allocation.py [--provider cuda|cpu] [--samples N]

With cpu, the CPU stands in: sums are computed inside the graph there, too.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import rdoq_onnx
from rdoq_onnx.system.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]
ZOO = Path(os.environ.get("ZOO", ROOT.parent / "shared" / "zoo"))
MINILM = Path(os.environ.get("MINILM", "/tmp/minilm"))  # made by the zoo's minilm/make.py
MODELS = {
    "digits_cnn": (ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"),
    "resnet20": (ZOO / "cifar10" / "resnet20.onnx", ZOO / "cifar10" / "calib.npz"),
    "mobilenet_v2": (ZOO / "imagenet" / "mobilenet_v2.onnx", ZOO / "imagenet" / "calib"),
    "minilm": (MINILM / "model.onnx", MINILM / "calib.npz"),
}
OTHER = 0.05  # share of channels that may get another width
DECIBELS = 0.5  # by which the output SQNR may fall
FREE = 1 << 30  # bytes of the memory that the CPU stands in with


def quantized(name: str, provider: str, samples: int) -> tuple[Any, float]:
    """Return the report of a run, and its seconds."""
    model, calibration = MODELS[name]
    begin = time.perf_counter()
    result = rdoq_onnx.quantize(
        model, calibration, weight_bits=4, activation_bits=8, effort="fast", samples=samples, provider=provider
    )
    return result.report, time.perf_counter() - begin


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--provider", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--samples", type=int, default=48)
    options.add_argument("--model", action="append", choices=MODELS)
    given = options.parse_args()
    missed = []
    for name in given.model or MODELS:
        if not all(path.exists() for path in MODELS[name]):
            sys.stdout.write(f"{name}: not here\n")
            continue
        host, seconds = quantized(name, "cpu", given.samples)
        if given.provider == "cuda":
            device, others = quantized(name, "cuda", given.samples)
        else:
            with patch.object(Runtime, "in_graph", True), patch.object(Runtime, "memory", lambda self: FREE):
                device, others = quantized(name, "cpu", given.samples)
        bits = [np.concatenate([layer.bits for layer in report.layers]) for report in (host, device)]
        share, loss = float(np.mean(bits[0] != bits[1])), host.sqnr_db - device.sqnr_db
        verdict = "ok" if share <= OTHER and loss <= DECIBELS else "MISSED"
        missed += [name] * (verdict != "ok")
        sys.stdout.write(
            f"{name}: {100 * share:.1f} % of {len(bits[0])} channels differ, {host.sqnr_db:.2f} -> {device.sqnr_db:.2f}"
            f" dB, {seconds:.0f} -> {others:.0f} s: {verdict}\n"
        )
        sys.stdout.flush()
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
