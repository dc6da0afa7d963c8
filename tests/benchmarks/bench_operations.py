"""Bit operations at the SQNR of uniform widths, matched on calibration photos and judged once on all test photos.

    python tests/benchmarks/bench_operations.py FOLDER [--effort fast]

MobileNet-v2 of the zoo. Every second calibration photo is for calibration, the others for validation. One width
everywhere (W4A8, W6A6) proves an SQNR on half of the validation photos; `--sqnr` of that figure with `--cost bops` and
`--budget` of what one width costs then seeks the fewest operations, searching on the other half. Both files are judged
on the same test photos; ± is the 95 % interval of the difference over photos.
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

from rdoq_onnx.allocation.budget import uniform_bits
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measure import measure, regime
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.model.cost_rows import Amount, preset
from rdoq_onnx.model.external import attached
from rdoq_onnx.pipeline import Job
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.refinement.search import Goal
from rdoq_onnx.system.progress import Progress

MODEL, PHOTOS = ZOO / "imagenet" / "mobilenet_v2.onnx", ZOO / "imagenet" / "calib"
TEST = ZOO / "imagenet" / "test"
UNIFORM = {"W4A8": (4.0, 8.0), "W6A6": (6.0, 6.0)}
BOPS = preset("bops")
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


def matched(folder: Path, effort: str, curves: Path) -> Iterator[tuple[str, float, float, onnx.ModelProto]]:
    """Yield the name, bit operations, proven SQNR and model of each setting."""
    calibration, validation = halves(folder)
    for name, (weights, activations) in UNIFORM.items():
        config = Config(weight_bits=weights, activation_bits=activations, sqnr=0.0, effort=effort, threads=1)
        job = Job.of(str(MODEL), calibration, config, Progress(), str(curves), validation)
        steps = Steps(job.store, job.progress, regime(config))
        measured = measure(analyse(job.normal, config.selection), config, job.split, job.runtime, steps)
        uniform = uniform_bits(measured, config.budgets)
        assert uniform is not None
        proof = Reference(job.reference, measured, job.split.held_out, job.runtime)
        goal = Goal("--sqnr", 0.0, proof, proof)
        model, spent = emit_model(uniform, {}).model, Pricing(measured, BOPS).total(uniform)
        least = goal.prove(model).bound
        yield name, spent, least, model
        config = replace(config, weight_bits=8.0, activation_bits=8.0, sqnr=least, cost=BOPS, budget=Amount(spent))
        result = job.result(config)
        assert result.report.cost is not None
        yield f"ours at {name}", result.report.cost.spent, goal.prove(result.model).bound, result.model


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
    parser.add_argument("--effort", default="fast")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = matched(given.folder, given.effort, given.folder / f"{given.effort}.curves")
    rows = [(name, spent, proven, attached(model)) for name, spent, proven, model in found]
    for name, *_, model in rows:
        onnx.save(model, given.folder / f"{name.replace(' ', '_')}.onnx")
    judged = judge({name: model.SerializeToString() for name, *_, model in rows})
    sizes = (-14, 10, 8, 10, 9, 7, 18, 18)
    write(("setting", "bit ops", "saved", "proven dB", "test dB", "top-1", "difference dB", "of top-1"), sizes)
    for name, spent, proven, _ in rows:
        own, base = judged[name], name.removeprefix("ours at ")
        saved = 1 - spent / next(each[1] for each in rows if each[0] == base)
        figures = (f"{spent / 1e9:.3f} G", f"{saved:.1%}", f"{proven:.2f}", f"{own.sqnr_db:.2f}")
        top1 = f"{100 * own.hits.mean():.1f}"
        decibels, half, points, half_points = difference(own, judged[base])
        compared = ("", "") if name == base else (f"{decibels:+.2f} ± {half:.2f}", f"{points:+.1f} ± {half_points:.1f}")
        write((name, *figures, top1, *compared), sizes)


if __name__ == "__main__":
    main()
