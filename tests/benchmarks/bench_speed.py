"""Speed relative to the float forward pass of the same model, measured in the same run, and growth of times.

    python tests/benchmarks/bench_speed.py [--only TABLE] [--model MODEL] [--samples N]

Tables: adjoint, runs, equation7, growth, graphs; bench_allocate.py shows the growth of the allocation. README.md
describes each, with its bound.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from measuring import measured_whole
from onnx import helper, numpy_helper
from scipy.stats import spearmanr
from tables import parser, write
from targets import ROOT, ZOO
from turns import in_turns

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import Measurement, aimed_at
from rdoq_onnx.emission.quantized_model import bias_shift
from rdoq_onnx.gradients.backward import Backward, full_batches, static
from rdoq_onnx.gradients.batch_sizes import reverse_batch
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.passes.replace_weights import ReplaceWeights
from rdoq_onnx.report.report import Report
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime, cuda_problem
from rdoq_onnx.system.threads import workers

RUNTIME = Runtime("cpu")
ADJOINT = {"mobilenet_v2": 4.5, "squeezenet1_1": 3.2, "resnet20": 3.2}  # bound on forward and reverse over forward
ROUNDING = 60.0  # bound on the seconds of rounding, in addition to FORWARDS passes over the samples
FORWARDS = 120
PEAK = 3 << 30  # bytes
PLAIN_RUNS = 200
ROWS = (-15, -30, 11, 11, 11, -8)


@dataclass(frozen=True)
class Subject:
    """A model with its samples, and the number of samples of a whole run."""

    name: str
    path: Path
    calibration: Path
    samples: int

    def loaded(self, count: int) -> tuple[onnx.ModelProto, Samples]:
        """Load the normalized model and `count` samples."""
        normal = read_normalized(self.path)[1]
        return normal, samples_for(normal, self.calibration, Config(samples=count))


def subjects() -> dict[str, Subject]:
    own = ROOT / "models"
    available = [Subject(p.stem, p, own / "digits_calib.npz", 256) for p in sorted(own.glob("*.onnx"))]
    if ZOO.is_dir():
        imagenet, cifar = ZOO / "imagenet", ZOO / "cifar10"
        names = ("mobilenet_v2", "squeezenet1_1")
        available += [Subject(n, imagenet / f"{n}.onnx", imagenet / "calib", 64) for n in names]
        available.append(Subject("resnet20", cifar / "resnet20.onnx", cifar / "calib.npz", 512))
    return {s.name: s for s in available}


def adjoint_rows(subject: Subject, count: int) -> Iterator[tuple[str, ...]]:
    """Compare forward and reverse in one run, with all tensors that the measurement fetches, with forward alone."""
    normal, samples = subject.loaded(count or 32)
    parts = find_parts(normal)
    network = aimed_at(analyse(normal, Config().selection), measured_tensors(parts))
    observation = observe(network, parts, samples, RUNTIME)
    for batch in dict.fromkeys((reverse_batch(network, observation, RUNTIME, len(samples)), 8)):
        with workers(1) as pool:
            plan = ReversePlan(network, samples, observation.metric, RUNTIME, pool, batch, 0)
        both = Backward.of(plan).loaded(RUNTIME).session
        feeds = next(full_batches(samples, batch))[1]
        forward = RUNTIME.session(static(network.model, feeds), "all")
        signs = np.random.default_rng(0)
        seeds = {
            i.name: signs.choice(np.float32([-1, 1]), i.shape) for i in both.handle.get_inputs() if i.name not in feeds
        }
        turns = in_turns(lambda f=feeds, s=seeds, b=both: b.run({**f, **s}), lambda f=feeds, w=forward: w.run(f), 15)
        yield row(subject, f"adjoint, batch {batch}", turns.second, turns.first, turns.ratio, ADJOINT.get(subject.name))


def run_rows(subject: Subject, count: int) -> Iterator[tuple[str, ...]]:
    """Time a whole run of the command line at W4A8, and forward passes over its samples before and after."""
    count = count or subject.samples
    normal, samples = subject.loaded(count)
    session = RUNTIME.session(normal, "all")

    def forward() -> float:
        feeds = list(samples.batches(8))
        return timed(lambda: [session.run(f) for f in feeds])

    before = [forward() for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable,
            "-m",
            "rdoq_onnx",
            subject.path,
            Path(folder, "out.onnx"),
            "--quiet",
            "--calibration",
            subject.calibration,
            "--samples",
            str(count),
            "--weight-bits",
            "4",
            "--activation-bits",
            "8",
            "--json",
            report,
        ]
        begin = time.perf_counter()
        child = subprocess.Popen([*map(str, command)], cwd=Path(__file__).parent)
        _, status, usage = os.wait4(child.pid, 0)
        whole = time.perf_counter() - begin
        if status:
            yield subject.name, "run failed", "", "", "", "FAILED"
            return
        steps = json.loads(report.read_text())["seconds"]
    once = statistics.median([*before, *(forward() for _ in range(3))])
    bound = FORWARDS * once + ROUNDING if subject.name == "mobilenet_v2" else None
    yield row(subject, f"run, {count} samples", once, whole, (whole - steps["candidates"]) / once, None)
    if bound:
        yield subject.name, "  allowed", "", f"{bound:.1f} s", "", verdict(whole, bound)
    peak = 1024 * usage.ru_maxrss
    yield subject.name, "  peak", "", f"{peak / 2**30:.2f} GiB", "", verdict(peak, PEAK)
    for name, seconds in steps.items():
        yield row(subject, f"  {name}", once, seconds, seconds / once, None)


def equation7_rows(subject: Subject, count: int) -> Iterator[tuple[str, ...]]:
    """Compare all first-order curves with the literal reading of Eq. 7, a forward run per channel and width."""
    normal, samples = subject.loaded(count or 64)
    progress, config = Progress(), Config(effort="fast")
    measurement = measured_whole(analyse(normal, config.selection), config, samples, RUNTIME, progress)
    judging = SampleSplit.whole(samples, config.seed).measuring
    widths = sorted(measurement.layers[0].codes)
    pairs = random_channels(measurement, widths)
    network, metric = measurement.aimed, measurement.observation.metric
    session = RUNTIME.session(network.model, "all")
    batches = [(n, feeds, session.run(feeds, metric.outputs)) for n, feeds in judging.counted_batches(8)]
    exact, runs = zip(*(plain(measurement, network, batches, *pair) for pair in pairs), strict=True)
    rows = measurement.unit_rows()
    curves = np.array([measurement.curves.distortion[rows[k].start + unit, b] for k, unit, b in pairs])
    whole = statistics.fmean(runs) * measurement.channels * len(widths)
    ratio = whole / progress.seconds["taylor"]
    yield row(
        subject,
        f"Eq. 7, {len(pairs)} runs, {len(judging)} samples",
        progress.seconds["taylor"],
        whole,
        ratio,
        1000 if subject.name == "mobilenet_v2" else None,
        least=True,
    )
    picked = np.array([b for _, _, b in pairs])
    groups = {"2 to 8 bits": (picked >= 2, 0.98), "0 and 1 bit": (picked < 2, 0.9)}
    for name, (some, bound) in groups.items():
        rank = spearmanr(curves[some], np.array(exact)[some]).statistic
        yield subject.name, f"  Spearman, {name}", "", "", f"{rank:.4f}", "ok" if rank >= bound else "MISSED"


def random_channels(measurement: Measurement, widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Draw random channels, each at the next width in turn; return (layer, channel, width) of each."""
    rng = np.random.default_rng(0)
    rows = measurement.unit_rows()
    starts = np.array([r.start for r in rows])
    channels = rng.choice(measurement.channels, min(PLAIN_RUNS, measurement.channels), replace=False)
    layers = np.searchsorted(starts, channels, side="right") - 1
    return [
        (int(k), int(c - starts[k]), widths[n % len(widths)])
        for n, (k, c) in enumerate(zip(layers, channels, strict=True))
    ]


def plain(
    measurement: Measurement, network: Network, batches: Sequence[Any], k: int, unit: int, bits: int
) -> tuple[float, float]:
    """Return (δ, seconds of the forward run) of one channel at one width, the rest float."""
    metric, layer, codes = measurement.observation.metric, network.layers[k], measurement.layers[k].codes[bits]
    tensor = next(t for t in network.model.graph.initializer if t.name == layer.weight)
    original = layer.linear.rows(numpy_helper.to_array(tensor))
    changed = original.copy()
    changed[unit] = codes.values[unit]
    shift = bias_shift(layer, changed - original, measurement.layers[k].mean)
    replaced = ReplaceWeights([(layer, layer.linear.tensor(changed), shift)])(network.model)
    session = RUNTIME.session(replaced, "all")
    total = seconds = 0.0
    for number, feeds, target in batches:
        begin = time.perf_counter()
        values = session.run(feeds, metric.outputs)
        seconds += time.perf_counter() - begin
        total += float(metric.errors(values, target, number).sum())
    return total / sum(n for n, _, _ in batches), seconds


def growth_rows(subject: Subject, count: int) -> Iterator[tuple[str, ...]]:
    """Time the first-order measurement over samples, layers and channels, and fit the exponents."""
    counts = [32, 64, 128, 256]
    normal, samples = subject.loaded(count or counts[-1])
    yield from grown(subject.name, "samples", counts, lambda n: measured(normal, samples.some(n)))
    depths = [4, 8, 16, 32]
    yield from grown("chain", "layers", depths, lambda n: measured(*chain(n)))
    channels = [32, 128, 512]
    yield from grown("chain", "channels of 4 layers", channels, lambda n: measured(*chain(4, n)))


def graph_rows(subject: Subject, count: int) -> Iterator[tuple[str, ...]]:
    """Compare steps with sums inside the graph, on CUDA if available, with steps with sums by numpy."""
    provider = "cpu" if cuda_problem() else "cuda"

    def run(provider: str) -> Report:
        return rdoq_onnx.quantize(
            subject.path,
            subject.calibration,
            weight_bits=4,
            activation_bits=8,
            effort="fast",
            provider=provider,
            samples=count or min(subject.samples, 64),
        ).report

    host = run("cpu")
    with patch.object(Runtime, "in_graph", True):
        graphs = run(provider)
    for step in ("observe", "moments", "sensitivity", "clipping", "taylor", "taylor, activations"):
        if step in host.seconds:
            first, second = host.seconds[step], graphs.seconds[step]
            yield row(subject, f"numpy, {provider} graphs: {step}", first, second, second / first, None)
    bits = [np.concatenate([x.bits for x in report.layers]) for report in (host, graphs)]
    yield subject.name, f"  of {bits[0].size} channels, other widths", "", "", f"{np.mean(bits[0] != bits[1]):.4f}", ""


def grown(name: str, what: str, sizes: Sequence[int], work: Callable[[int], float]) -> Iterator[tuple[str, ...]]:
    times = [work(n) for n in sizes]
    exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    for size, seconds in zip(sizes, times, strict=True):
        yield name, f"{size} {what}", "", f"{seconds:.2f} s", "", ""
    yield name, f"  exponent over {what}", "", "", f"{exponent:.2f}", ""


def measured(model: onnx.ModelProto, samples: Samples) -> float:
    """Return the CPU seconds of a measurement."""
    config = Config(effort="fast")
    network = analyse(model, config.selection)
    begin = time.process_time()
    measured_whole(network, config, samples, RUNTIME)
    return time.process_time() - begin


def chain(depth: int, channels: int = 16) -> tuple[onnx.ModelProto, Samples]:
    """Make `depth` convolutions in groups of 16 channels, each with a Relu, and 32 samples."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for k in range(depth):
        weight = rng.standard_normal((channels, 16, 3, 3), np.float32) / 8
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{k}"))
        own = {"pads": [1, 1, 1, 1], "group": channels // 16}
        nodes.append(helper.make_node("Conv", [f"x{k}", f"w{k}"], [f"z{k}"], f"conv{k}", **own))
        nodes.append(helper.make_node("Relu", [f"z{k}"], [f"x{k + 1}"], f"relu{k}"))
    value = helper.make_tensor_value_info
    ends = [value(n, onnx.TensorProto.FLOAT, ["N", channels, 16, 16]) for n in ("x0", f"x{depth}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x0": rng.standard_normal((32, channels, 16, 16), np.float32)}
    normal = read_normalized(model)[1]
    return normal, samples_for(normal, feeds, Config())


def row(
    subject: Subject, what: str, first: float, second: float, ratio: float, bound: float | None, least: bool = False
) -> tuple[str, ...]:
    kept = "" if bound is None else verdict(*((bound, ratio) if least else (ratio, bound)))
    return subject.name, what, f"{first:.4f} s", f"{second:.4g} s", f"{ratio:.2f}", kept


def verdict(value: float, bound: float) -> str:
    return "ok" if value <= bound else "MISSED"


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


TABLES: dict[str, Callable[[Subject, int], Iterator[tuple[str, ...]]]] = {
    "adjoint": adjoint_rows,
    "runs": run_rows,
    "equation7": equation7_rows,
    "growth": growth_rows,
    "graphs": graph_rows,
}


def main() -> None:
    """Print the selected tables."""
    available = subjects()
    arguments = parser(__doc__, TABLES, available)
    arguments.add_argument("--samples", type=int, default=0, metavar="N", help="calibration samples")
    args = arguments.parse_args()
    write(("model", "what", "first", "second", "ratio", ""), ROWS)
    for table in args.only or TABLES:
        for name in args.model or (["digits_cnn"] if table == "growth" else available):
            for cells in TABLES[table](available[name], args.samples):
                write(cells, ROWS)


if __name__ == "__main__":
    main()
