"""The gain of each part of rounding: the same run with one more technique each time.

    python tests/benchmarks/bench_rounding.py [--only MODEL] [--settings W4A8,...] [--limit N]

Rows: weights rounded to nearest at the scale of least error; with error compensation under the covariance of the
layer's input; with the positions before a pool in place of missing samples; with the sensitivity of the output
(candidates/sensitivity.py); with the best variant for each channel instead of each layer, as emitted. All have bias
correction and are allocated from their own curves, without refinement. Curves depend on the setting only through the
activation budget (equalization), and are measured once, at the first setting.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from bench_quality import parse, parse_settings
from measuring import measured_whole
from numpy.typing import NDArray
from tables import write
from targets import Model, models

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import Samples, input_specs
from rdoq_onnx.candidates import moments
from rdoq_onnx.candidates.layer_rows import LayerRows
from rdoq_onnx.config import Config
from rdoq_onnx.curves import select, steps
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.observation.distortion import sqnr_db
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu")
BATCH = 32
SIZES = (-14, -33, -8, 9, 9, 10)


def layer_wise(distortion: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """Let all channels of a layer take the variant that is best for their sum, whatever the number of draws."""
    del draws
    total = distortion.sum(axis=1, keepdims=True)
    return np.where(total == total.min(axis=0), distortion, np.inf)


NEAREST = patch.object(LayerRows, "codes", lambda rows, second, damping, starts: dict(starts))
NO_POOL = patch.object(moments._Pool, "before", classmethod(lambda cls, layer, graph: None))
BLIND = patch.object(steps, "with_sensitivity", lambda plan, moments, advance: moments)
LAYER_WISE = patch.object(select, "shrunk_variants", layer_wise)
VARIANTS: dict[str, Sequence[Any]] = {
    "to nearest": (NEAREST, NO_POOL, BLIND, LAYER_WISE),
    "compensated": (NO_POOL, BLIND, LAYER_WISE),
    "and positions before pools": (BLIND, LAYER_WISE),
    "and sensitivity": (LAYER_WISE,),
    "and variants by channel": (),
}


def rows(model: Model, settings: Sequence[str], limit: int) -> Iterator[tuple[str, ...]]:
    original, normal = read_normalized(model.path)
    specs = input_specs(normal)
    calibration, test = load_samples(model.calibration, specs, None), load_samples(model.test, specs, limit or None)
    reference = outputs(original, test)
    for name, patches in VARIANTS.items():
        with ExitStack() as stack:
            for one in patches:
                stack.enter_context(one)
            config = config_of(settings[0])
            measured = measured_whole(analyse(normal, config.selection), config, calibration, RUNTIME)
        for setting in settings:
            allocation = allocate_bits(measured, config_of(setting).budgets)
            values = outputs(quantized_model(allocation), test)
            noise, power = float(np.square(values - reference).sum()), float(np.square(reference).sum())
            agree = 100 * float((values.argmax(axis=1) == reference.argmax(axis=1)).mean())
            figures = f"{sqnr_db(power, noise):.2f}", f"{agree:.2f}", f"{allocation.predicted:.4g}"
            yield model.name, name, setting, *figures


def config_of(setting: str) -> Config:
    weights, activations, _ = parse(setting)
    return Config(weight_bits=float(weights), activation_bits=None if activations is None else float(activations))


def outputs(model: onnx.ModelProto, samples: Samples) -> NDArray[np.float64]:
    """Return the first output for all samples, [samples, elements]."""
    session = RUNTIME.session(model, "all")
    values = [session.run(feeds)[0] for feeds in samples.batches(BATCH)]
    return np.concatenate(values).reshape(len(samples), -1).astype(np.float64)


def main() -> int:
    available = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[m.name for m in available], help="may be repeated")
    parser.add_argument("--settings", type=parse_settings, default=("W4A8", "W3A8", "W2A8"), metavar="W4A8,...")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="test samples; 0 for all")
    args = parser.parse_args()
    write(("model", "rounding", "setting", "SQNR dB", "agree %", "predicted"), SIZES)
    for model in available:
        if not args.only or model.name in args.only:
            for cells in rows(model, args.settings, args.limit):
                write(cells, SIZES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
