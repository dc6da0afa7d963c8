"""Bit operations at the SQNR of uniform widths, matched on calibration photos and judged once on all test photos.

    python tests/benchmarks/bench_operations.py FOLDER

MobileNet-v2 of the zoo, effort fast, no refinement on either side. Every second calibration photo is for calibration.
On the others, one width everywhere (W4A8, W6A6) reaches an SQNR, and the fewest operations that reach it, too, are
found by bisection. Both files are then judged on the same test photos; ± is the 95 % interval of the difference.
"""

import argparse
import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image
from tables import write
from targets import ZOO

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Budgets, Config
from rdoq_onnx.cost.early import priced
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measure import measure, regime
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.errors import BudgetError
from rdoq_onnx.model.cost_rows import Amount, preset
from rdoq_onnx.model.external import attached
from rdoq_onnx.pipeline import Job
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.system.progress import Progress

MODEL, PHOTOS = ZOO / "imagenet" / "mobilenet_v2.onnx", ZOO / "imagenet" / "calib"
TEST = ZOO / "imagenet" / "test"
UNIFORM = {"W4A8": (4.0, 8.0), "W6A6": (6.0, 6.0)}
BOPS = preset("bops")
STEPS = 9  # bisections of the budget
BATCH, NORMAL = 50, 1.96


@dataclass(frozen=True)
class Judged:
    """Powers of outputs and errors of each test photo, and whether its top class is the label."""

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]
    hits: NDArray[np.bool_]

    @property
    def sqnr_db(self) -> float:
        return float(10 * np.log10(self.signal.sum() / self.noise.sum()))


def halves(folder: Path) -> tuple[Path, Path]:
    """Link every second calibration photo into a folder of its own, the others into another."""
    parts = (folder / "calibration", folder / "validation")
    for k, part in enumerate(parts):
        part.mkdir(parents=True, exist_ok=True)
        for photo in sorted(PHOTOS.glob("*.jpg"))[k::2]:
            (part / photo.name).unlink(missing_ok=True)
            (part / photo.name).symlink_to(photo)
    return parts


def matched(folder: Path) -> Iterator[tuple[str, float, float, onnx.ModelProto]]:
    """Yield the name, bit operations, SQNR on the validation photos and model of each setting."""
    calibration, validation = halves(folder)
    for name, (weights, activations) in UNIFORM.items():
        config = Config(weight_bits=weights, activation_bits=activations, effort="fast", threads=1)
        measured, reference = _measured(config, calibration, validation, folder)
        uniform = uniform_bits(measured, config.budgets)
        assert uniform is not None
        least = _sqnr(uniform, reference)
        spent = Pricing(measured, BOPS).total(uniform)
        yield name, spent, least, attached(emit_model(uniform, {}).model)
        config = replace(config, cost=BOPS, budget=Amount(spent))
        measured, reference = _measured(config, calibration, validation, folder)
        best = _fewest(measured, reference, spent, least)
        ours = Pricing(measured, BOPS).total(best)
        yield f"ours at {name}", ours, _sqnr(best, reference), attached(emit_model(best, {}).model)


def _measured(config: Config, calibration: Path, validation: Path, folder: Path) -> tuple[Measurement, Reference]:
    """Measure curves in the regime of `config`; also return the float model on the validation photos."""
    job = Job.of(str(MODEL), calibration, config, Progress(), str(folder / "fast.curves"), validation)
    network = analyse(job.normal, config.selection)
    config = priced(network, config, job.samples, job.runtime)
    measured = measure(
        network, config, job.split, job.runtime, Steps(job.store, job.progress, regime(config, job.normal))
    )
    return measured, Reference(job.reference, measured, job.split.held_out, job.runtime)


def _fewest(measured: Measurement, reference: Reference, most: float, least: float) -> Allocation:
    """Return the allocation of fewest bit operations, up to `most`, that reaches `least` dB, by bisection."""
    low, high, best = 0.0, most, allocate_bits(measured, Budgets(cost=BOPS, budget=Amount(most)))
    for _ in range(STEPS):
        middle = (low + high) / 2
        try:
            tried = allocate_bits(measured, Budgets(cost=BOPS, budget=Amount(middle)))
        except BudgetError:
            low = middle
            continue
        if _sqnr(tried, reference) >= least:
            high, best = middle, tried
        else:
            low = middle
    return best


def _sqnr(allocation: Allocation, reference: Reference) -> float:
    return min(reference.powers(quantized_model(allocation)).sqnr_db)


def photos() -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Yield the test photos as the network reads them, in batches, with their labels."""
    rows = list(csv.DictReader((TEST / "labels.csv").open()))
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        images = np.stack([np.asarray(Image.open(TEST / row["file"]).convert("RGB")) for row in part])
        values = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        yield np.ascontiguousarray(values), np.array([int(row["label"]) for row in part])


def judge(models: dict[str, bytes]) -> dict[str, Judged]:
    """Compare all models with the float one on all test photos."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    reference, *sessions = (
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for model in (MODEL.read_bytes(), *models.values())
    )
    parts: dict[str, list[tuple[NDArray[np.float64], ...]]] = {name: [] for name in models}
    for images, labels in photos():
        (expected,) = reference.run(None, {reference.get_inputs()[0].name: images})
        for name, session in zip(models, sessions, strict=True):
            (found,) = session.run(None, {session.get_inputs()[0].name: images})
            noise = np.square(expected.astype(np.float64) - found).sum(axis=1)
            parts[name].append((np.square(expected.astype(np.float64)).sum(axis=1), noise, found.argmax(1) == labels))
    return {name: Judged(*map(np.concatenate, zip(*part, strict=True))) for name, part in parts.items()}


def difference(ours: Judged, theirs: Judged) -> tuple[float, float, float, float]:
    """Return by how many dB and points of top-1 ours is better, each with half its 95 % interval, paired."""
    influence = theirs.noise / theirs.noise.sum() - ours.noise / ours.noise.sum()
    hits = 100 * (ours.hits.astype(float) - theirs.hits)
    spread = 10 / math.log(10) * math.sqrt(float(np.square(influence).sum()))
    return (
        ours.sqnr_db - theirs.sqnr_db,
        NORMAL * spread,
        float(hits.mean()),
        NORMAL * float(hits.std()) / math.sqrt(len(hits)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the curves and the models")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = list(matched(given.folder))
    for name, *_, model in rows:
        onnx.save(model, given.folder / f"{name.replace(' ', '_')}.onnx")
    judged = judge({name: model.SerializeToString() for name, *_, model in rows})
    sizes = (-14, 10, 8, 12, 9, 7, 18, 18)
    write(("setting", "bit ops", "saved", "matched dB", "test dB", "top-1", "difference dB", "of top-1"), sizes)
    for name, spent, reached, _ in rows:
        own, base = judged[name], name.removeprefix("ours at ")
        saved = 1 - spent / next(each[1] for each in rows if each[0] == base)
        figures = (f"{spent / 1e9:.3f} G", f"{saved:.1%}", f"{reached:.2f}", f"{own.sqnr_db:.2f}")
        top1 = f"{100 * own.hits.mean():.1f}"
        decibels, half, points, half_points = difference(own, judged[base])
        compared = ("", "") if name == base else (f"{decibels:+.2f} ± {half:.2f}", f"{points:+.1f} ± {half_points:.1f}")
        write((name, *figures, top1, *compared), sizes)


if __name__ == "__main__":
    main()
