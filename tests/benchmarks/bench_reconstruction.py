"""The gain of each part of tuning by gradients: the same start, and the same number of steps, with one part each time.

    python tests/benchmarks/bench_reconstruction.py [--only MODEL] [--settings W4A4,...] [--steps N] [--limit N]

Rows: the allocation that tuning starts at, refined without and with ridge regression; its activation quantizers alone
tuned; biases alone; scales of weights alone; these three together; with integers; with augmented images; then without
tensors inside the network in the loss; without the pull of weights to their integers; with a fifth of the activations'
quantizers left out of each step at random (QDrop). "unseen" are the calibration samples that no step sees, on which one
chooses; "test" are others.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from bench_quality import parse_settings
from bench_rounding import RUNTIME, config_of, outputs
from tables import write
from targets import Model, models

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.calibration.augmentation import is_image
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import Samples, input_specs
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measure import measure, regime
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.observation.distortion import sqnr_db
from rdoq_onnx.pipeline import Job
from rdoq_onnx.reconstruction import training
from rdoq_onnx.reconstruction.training import RATES, Recipe, Trainer
from rdoq_onnx.reconstruction.variables import Kind
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.plan import EFFORTS
from rdoq_onnx.refinement.refine import refine
from rdoq_onnx.system.progress import Progress

SIZES = (-14, -8, -34, 9, 9, 9, 9)


def only(*kinds: Kind) -> Mapping[Kind, float]:
    return {kind: rate for kind, rate in RATES.items() if kind in kinds}


CONTINUOUS: tuple[Kind, ...] = ("scales", "biases", "steps", "zeros")
PARTS: Mapping[str, Recipe] = {
    "activation quantizers": Recipe(rates=only("steps", "zeros")),
    "biases": Recipe(rates=only("biases")),
    "scales of weights": Recipe(rates=only("scales")),
    "these three": Recipe(rates=only(*CONTINUOUS)),
    "and integers": Recipe(),
    "and augmented images": Recipe(moved=True),
    "the same without tensors inside": Recipe(inside=0.0, moved=True),
    "the same without the pull": Recipe(moved=True),
    "the same with random activations": Recipe(moved=True, left_out=0.2),
}


def rows(model: Model, setting: str, steps: int, limit: int) -> Iterator[tuple[str, ...]]:
    config = Config(**{**vars(config_of(setting)), "effort": "default"})
    job = Job.of(model.path, model.calibration, config, Progress())
    kept = Steps(job.store, job.progress, regime(config, job.normal))
    measurement = measure(analyse(job.normal, config.selection), config, job.split, RUNTIME, kept)
    first = allocate_bits(measurement, config.budgets)
    without = {effort: replace(plan, ridges=0) for effort, plan in EFFORTS.items()}
    with patch.dict(EFFORTS, without):
        plain = refine(first, config, job.split, RUNTIME, kept).allocation
    start = refine(first, config, job.split, RUNTIME, kept).allocation
    test = load_samples(model.test, input_specs(job.normal), limit or None)
    images = is_image(job.split.fitting.feeds(slice(0, 1)))
    judge = Judge.of(measurement, job.split.measuring, RUNTIME, kept)
    expected = outputs(job.reference, test)

    def figures(allocation: Allocation) -> tuple[str, ...]:
        values = outputs(quantized_model(allocation), test)
        unseen = sqnr_db(measurement.observation.metric.signal, judge.distortion(allocation))
        noise, power = float(np.square(values - expected).sum()), float(np.square(expected).sum())
        agree = 100 * float((values.argmax(axis=1) == expected.argmax(axis=1)).mean())
        return f"{unseen:.2f}", f"{sqnr_db(power, noise):.2f}", f"{agree:.2f}"

    yield model.name, setting, "start", *figures(plain), ""
    yield model.name, setting, "with ridge regression", *figures(start), ""
    for name, recipe in PARTS.items():
        if recipe.moved and not images:
            continue
        changed: Any = patch.object(training, "_PULL", 0.0) if name.endswith("pull") else nullcontext()
        with changed:
            tuned, changes = _tuned(start, job.split.fitting, recipe, steps)
        yield model.name, setting, name, *figures(tuned), f"{changes:,}"


def _tuned(start: Allocation, samples: Samples, recipe: Recipe, steps: int) -> tuple[Allocation, int]:
    """Return what `steps` lead to, and how many integers they changed."""
    trainer = Trainer.of(start, samples, RUNTIME, recipe, 0)
    before = [weight.codes.integers for weight in trainer.variables.weights.values()]
    for number in range(steps):
        trainer.step(number, steps)
    after = [weight.codes.integers for weight in trainer.variables.weights.values()]
    return trainer.variables.tuned(), sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))


def main() -> int:
    available = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[m.name for m in available], help="may be repeated")
    parser.add_argument("--settings", type=parse_settings, default=("W4A4", "W2A8"), metavar="W4A4,...")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of gradient descent, in each row")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="test samples; 0 for all")
    args = parser.parse_args()
    write(("model", "setting", "tuned", "unseen dB", "test dB", "agree %", "changed"), SIZES)
    for model in available:
        if not args.only or model.name in args.only:
            for setting in args.settings:
                for cells in rows(model, setting, args.steps, args.limit):
                    write(cells, SIZES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
