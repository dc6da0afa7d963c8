"""Check first-order curves against exact ones, and their sum against the emitted model.

    python tests/benchmarks/bench_curves.py [--only MODEL] [--samples N] [--channels N] [--same]

Models: those of models/, and ResNet-20 if ../shared/zoo exists. Curves are measured as by the command line at effort
"fast" (before), and anchored to a few exact runs by curves/anchoring.py (after).

First table: Spearman's rank correlation with exact δ (Eq. 7), before and after anchoring: for random weight channels,
each alone, at each width; for whole layers, all channels at once, against the sum of their curves, at the anchored
widths; for all activations. Then the geometric mean of curve over exact δ, 1 if levels are right. Exact δ are measured
on held-out samples, so part of the error comes from the samples; with --same on the samples of the curves, some of
which the anchors used.

Second table: predicted is the sum of the chosen curves, measured is δ of the emitted model on held-out samples; their
ratio is 1 if distortions add up (Eq. 6).
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tables import write
from targets import ROOT, ZOO

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.anchoring import WEIGHT_BITS, anchor
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.curves.measure import measure_network
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.verification.verify import Reference, verify

RUNTIME = Runtime("cpu", 2)
WIDTHS = range(8)
ANCHORING = 32  # samples of exact runs
ANCHORED = range(WEIGHT_BITS + 1)
BUDGETS = (2, 3, 4, 6, 8)
SEED = 0
ROWS = (-14, -16, 7, 9, 9, 9, 9)
SUMS = (-14, -8, 10, 10, 9, 10, 10, 9)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """A model with its curves before and after anchoring, and samples to check them on."""

    name: str
    original: onnx.ModelProto
    before: Measurement
    after: Measurement
    measuring: Samples
    held_out: Samples

    @classmethod
    def of(cls, name: str, model: Any, calibration: Any, count: int) -> "Subject":
        config = Config(samples=count, effort="fast")
        original, normal = read_normalized(model)
        samples = samples_for(normal, calibration, config)
        split, steps = SampleSplit.of(samples, config.seed), Steps(Store(), Progress(), "benchmark")
        before = measure_network(analyse(normal, config.selection), config, split, RUNTIME, steps)
        exact = prober(before, split.measuring.some(ANCHORING))
        after = anchor(before, exact, exact, lambda done: None)
        return cls(name, original, before, after, split.measuring, split.held_out)


@dataclass(frozen=True)
class Alone:
    """Weights of a layer with one channel replaced; stands in for WeightCodes."""

    values: Array


def prober(measurement: Measurement, samples: Samples) -> Prober:
    """Make a prober of the network of `measurement`."""
    observation = measurement.observation
    return Prober(measurement.network, samples, observation.metric, RUNTIME, observation.batching)


def exact_channels(measurement: Measurement, judge: Prober, channels: NDArray[np.int64]) -> Array:
    """Measure exact δ of `channels` (rows of the curves, rising), each alone, at all WIDTHS; [channels, widths]."""
    tensors = {t.name: t for t in measurement.network.model.graph.initializer}
    parts = []
    for each, rows in zip(measurement.layers, measurement.unit_rows(), strict=True):
        layer, codes, mean = each.layer, each.codes, each.mean
        units = channels[(channels >= rows.start) & (channels < rows.stop)] - rows.start
        original = layer.linear.rows(onnx.numpy_helper.to_array(tensors[layer.weight])).astype(np.float64)
        changed = []
        for unit, bits in itertools.product(units, WIDTHS):
            changed.append(Alone(original.copy()))
            changed[-1].values[unit] = codes[bits].values[unit]
        if changed:
            parts.append(judge.whole_layer(layer, changed, mean).reshape(len(units), len(WIDTHS)))
    return np.concatenate(parts)


def exact_layers(measurement: Measurement, judge: Prober) -> Array:
    """Measure exact δ of each layer, all channels at once, at each anchored width; [layers, widths]."""
    exact = [judge.whole_layer(x.layer, [x.codes[b] for b in ANCHORED], x.mean) for x in measurement.layers]
    return np.stack(exact)


def exact_activations(measurement: Measurement, judge: Prober) -> list[tuple[int, int, float]]:
    """Measure (row of the curves, bits, exact δ) of every activation at all its widths."""
    triples = []
    for row, each in enumerate(measurement.activations, measurement.channels):
        table = each.quantizers
        values = judge.activation(each.activation, list(table.values()))
        triples += [(row, bits, float(value)) for bits, value in zip(table, values, strict=True)]
    return triples


def compared(first: Array, second: Array, exact: Array) -> tuple[str, ...]:
    """Return number of pairs, correlation before and after anchoring, mean ratio before and after."""
    correlations = [f"{spearmanr(curve, exact).statistic:.4f}" for curve in (first, second)]
    return str(len(exact)), *correlations, *(f"{level(curve, exact):.3f}" for curve in (first, second))


def level(curve: Array, exact: Array) -> float:
    """Return the geometric mean of curve over exact δ, where both are positive."""
    alive = (curve > 0) & (exact > 0)
    return float(np.exp(np.log(curve[alive] / exact[alive]).mean())) if alive.any() else np.nan


def curve_rows(subject: Subject, count: int, same: bool) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the first table."""
    judge = prober(subject.before, subject.measuring if same else subject.held_out)
    total = subject.before.channels
    picked = np.sort(np.random.default_rng(SEED).choice(total, min(count, total), replace=False))
    exact = exact_channels(subject.before, judge, picked)
    curves = [m.curves.distortion[picked][:, list(WIDTHS)] for m in (subject.before, subject.after)]
    for bits in WIDTHS:
        yield f"weights, {bits} bits", *compared(*(c[:, bits] for c in curves), exact[:, bits])
    yield "weights, all", *compared(*(c.ravel() for c in curves), exact.ravel())
    yield from layer_rows(subject, judge)
    rows, widths, values = map(np.array, zip(*exact_activations(subject.before, judge), strict=True))
    tables = [m.curves.distortion[rows, widths] for m in (subject.before, subject.after)]
    yield "activations, all", *compared(*tables, values)


def layer_rows(subject: Subject, judge: Prober) -> Iterator[tuple[str, ...]]:
    """Yield rows of the first table: the sum of a layer's curves against the whole layer."""
    exact = exact_layers(subject.before, judge)
    curves = [
        np.stack([m.curves.distortion[rows][:, list(ANCHORED)].sum(axis=0) for rows in m.unit_rows()])
        for m in (subject.before, subject.after)
    ]
    for bits in ANCHORED:
        yield f"layers, {bits} bits", *compared(*(c[:, bits] for c in curves), exact[:, bits])


def sum_rows(subject: Subject) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the second table: weights with 8-bit activations, then both at the same budget."""
    budgets = [(b, 8) for b in BUDGETS] + [(b, b) for b in BUDGETS if b != 8]
    for weights, activations in budgets:
        config = Config(weight_bits=weights, activation_bits=activations)
        parts = [sums(subject, m, config) for m in (subject.before, subject.after)]
        yield f"W{weights}A{activations}", *itertools.chain(*parts)


def sums(subject: Subject, measurement: Measurement, config: Config) -> tuple[str, ...]:
    """Return predicted δ, measured δ, and their ratio, for the widths that the curves give."""
    allocation = allocate_bits(measurement, config.budgets)
    predicted = allocation.predicted
    try:
        reference = Reference(subject.original, subject.held_out, RUNTIME)
        verification = verify(emit_model(allocation, {}), allocation, reference)
    except VerificationError:
        return f"{predicted:.2e}", "refused", ""
    return f"{predicted:.2e}", f"{verification.measured:.2e}", f"{verification.measured / predicted:.3f}"


def sources() -> dict[str, tuple[Any, Any]]:
    """List the available models with their calibration samples."""
    own, cifar = ROOT / "models", ZOO / "cifar10"
    paths = {path.stem: (path, own / "digits_calib.npz") for path in sorted(own.glob("*.onnx"))}
    if cifar.is_dir():
        paths["resnet20"] = cifar / "resnet20.onnx", cifar / "calib.npz"
    return paths


def arguments(models: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(models), help="may be repeated")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="calibration samples (256)")
    parser.add_argument("--channels", type=int, default=64, metavar="N", help="weight channels compared (64)")
    parser.add_argument("--same", action="store_true", help="exact δ on the samples of the curves")
    return parser.parse_args()


def main() -> None:
    """Print both tables, one after the other."""
    available = sources()
    args = arguments(available)
    picked = {name: paths for name, paths in available.items() if not args.only or name in args.only}
    subjects = [Subject.of(name, *paths, args.samples) for name, paths in picked.items()]
    write(("", "", "", "Spearman", "", "level", ""), ROWS)
    write(("model", "curves", "pairs", "before", "after", "before", "after"), ROWS)
    for subject in subjects:
        for row in curve_rows(subject, args.channels, args.same):
            write((subject.name, *row), ROWS)
    sys.stdout.write("\n")
    write(("", "", "before", "", "", "after", "", ""), SUMS)
    write(("model", "setting", *("predicted", "measured", "ratio") * 2), SUMS)
    for subject in subjects:
        for row in sum_rows(subject):
            write((subject.name, *row), SUMS)


if __name__ == "__main__":
    main()
