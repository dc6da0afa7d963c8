"""List what a run would quantize and estimate its time, from a few timed passes.

The time of a step is a number of passes of the float network over a number of samples, which are timed, plus rounding,
which is timed on one layer. Steps with a cost per call (sessions, emission) add the time to load the network.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.float_constants import left_by_plan
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import Model, read_normalized
from rdoq_onnx.analysis.weight_only import BITS
from rdoq_onnx.calibration.split import FITTING, HELD_OUT
from rdoq_onnx.candidates.blocks import in_parts
from rdoq_onnx.candidates.candidates import widest
from rdoq_onnx.candidates.make import make_candidates
from rdoq_onnx.candidates.moment_passes import passes
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.config import Config
from rdoq_onnx.curves.anchoring import SAMPLES, WEIGHT_BITS, WORK
from rdoq_onnx.curves.float_fallback import in_float, unfed
from rdoq_onnx.curves.measure import scratch_for
from rdoq_onnx.curves.measurement import activation_elements, aimed_at
from rdoq_onnx.curves.steps import CLIPPING, SENSING
from rdoq_onnx.gradients.plan import rows_of
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.observation.inputs import batched, samples_for
from rdoq_onnx.observation.observe import Observation, observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.refinement.judge import JUDGING
from rdoq_onnx.refinement.plan import EFFORTS
from rdoq_onnx.report.wording import pin_of, skip_lines, step_name
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

TIMED = 8  # samples of the timed passes
_REVERSE = 6.0  # a forward and reverse pass with its products, in forward passes
_VERIFY = 7.0  # runs of each held-out sample


@dataclass(frozen=True)
class DryRun:
    """What a run would quantize. elements: of each activation, per sample. seconds: estimate for each step."""

    network: Network
    elements: tuple[int, ...]
    samples: int
    source: str
    seconds: Mapping[str, float]


def dry_run(model: Model, calibration: Any, config: Config) -> DryRun:
    """Read and analyse the model and run a few samples. Raises what a run would raise up to there."""
    runtime = Runtime(config.provider, config.threads)
    scratch = scratch_for(config, None)
    normal = read_normalized(model, scratch.shelf)[1]
    network = analyse(normal, config.selection)
    samples = batched(network, normal, samples_for(normal, calibration, config), runtime)
    parts = find_parts(network.model)
    aimed = aimed_at(network, measured_tensors(parts))
    few = samples.some(TIMED)
    begin = time.perf_counter()
    observation = observe(aimed, parts, few, runtime)
    loaded = time.perf_counter()
    observe(aimed, parts, few, runtime)
    again = time.perf_counter() - loaded
    network = in_float(network, unfed(network, observation.sizes))
    load = max(loaded - begin - again, again / 4)
    seconds = _seconds(network, config, observation, len(samples), again / len(few), load)
    seconds["candidates"] = _rounding(network, config, observation)
    elements = tuple(activation_elements(a, observation.sizes) for a in network.activations)
    return DryRun(network, elements, len(samples), samples.source, seconds)


def _seconds(
    network: Network, config: Config, observation: Observation, samples: int, one: float, load: float
) -> dict[str, float]:
    """Estimate the seconds of each step. one: seconds per sample of a pass; load: to create a session."""
    seen = samples * (1 - HELD_OUT)
    ends = {"observe": load + seen * one, "verify": 6 * load + samples * HELD_OUT * _VERIFY * one}
    if not network.layers:
        return ends
    fitting, measuring = seen * FITTING, seen * (1 - FITTING)
    units = len(network.layers) + len(network.activations)
    rows = rows_of(observation.metric.elements)
    judging = min(measuring, JUDGING)
    work = sum(observation.sizes.values())
    plan = EFFORTS[config.effort].within(int(judging * work), units, len(network.activations), len(network.layers))
    narrow = sum(b <= WEIGHT_BITS for b in config.widths)
    runs = narrow * len(network.layers) + 8 * len(network.activations)
    anchoring = min(WORK[config.effort] / max(runs * work, 1), SAMPLES[1], measuring)
    seconds = ends | {
        "moments": load + 2 * fitting * passes(network) * one,
        "sensitivity": 2 * load + min(SENSING, fitting) * _REVERSE * one,
        "clipping": 2 * load + (CLIPPING * (_REVERSE + rows) * one if network.activations else 0.0),
        "taylor": 2 * load + measuring * (_REVERSE + rows) * one,
        "second look": plan.trials * (2 * load + judging * one),
    }
    if config.measure == "probe":
        channels = sum(layer.linear.channels for layer in network.layers)
        perturbed = 2 * channels * len(config.widths) + 8 * 8 * len(network.activations)
        seconds["probe"] = load * units + measuring * perturbed * one / 2
    elif anchoring >= SAMPLES[0]:
        seconds["ties"] = load * units + anchoring * runs * one / 2
    return seconds


def _rounding(network: Network, config: Config, observation: Observation) -> float:
    """Estimate the seconds to round all weights from those of one layer of median size."""
    if not network.layers:
        return 0.0
    layer = sorted(network.layers, key=_work)[len(network.layers) // 2]
    widths = tuple(sorted({min(w, 7 if network.activations else 8) for w in config.widths}))
    groups = layer.linear.group
    inputs = int(np.prod(layer.linear.shape)) // layer.linear.channels
    if layer.linear.op_type == "ConvTranspose":
        inputs //= groups
    mean = np.zeros((groups, inputs))
    width = in_parts(mean[..., None]).shape[1]
    count = groups * -(-inputs // width)
    covariance = np.broadcast_to(np.eye(width), (count, width, width)).copy()
    alone = replace(network, layers=(layer,), activations=())
    with workers(config.threads) as pool:
        begin = time.perf_counter()
        make_candidates(alone, widths, observation.ranges, [Moments(mean, covariance, covariance)], pool)
        took = time.perf_counter() - begin
        threads = min(pool.threads, len(network.layers))
    return took * sum(map(_work, network.layers)) / (_work(layer) * threads)


def _work(layer: Layer) -> float:
    """Return the relative cost of rounding a layer: each weight updates those of its row."""
    elements = float(np.prod(layer.linear.shape))
    return elements * (32 + elements / layer.linear.channels)


_SHOWN = 0.02  # minimum share of the time for a step to be named


def lines(result: DryRun, verbose: bool = False) -> Iterator[str]:
    """Word layers, activations, what stays in float and why, and the estimated time; `verbose`: every node in float."""
    network = result.network
    channels = sum(layer.linear.channels for layer in network.layers)
    weights = sum(int(np.prod(layer.linear.shape)) for layer in network.layers)
    yield f"{len(network.layers)} layers, {channels:,} channels, {weights:,} weights ({weights / 250:,.1f} kB in float)"
    bits = widest(network)
    for layer in network.layers:
        elements = int(np.prod(layer.linear.shape))
        shape = "x".join(map(str, layer.linear.shape))
        figures = f"{layer.linear.op_type}, {layer.linear.channels} channels, {elements:,} weights, {shape}"
        yield f"  {pin_of(layer.name, bits)}  # {figures}"
    feeding = [(a, n) for a, n in zip(network.activations, result.elements, strict=True) if not a.fusion]
    fusion = [(a, n) for a, n in zip(network.activations, result.elements, strict=True) if a.fusion]
    yield f"{len(feeding)} activations, {sum(n for _, n in feeding):,} elements per sample"
    for activation, elements in feeding:
        yield f"  {pin_of(activation.tensor, 8)}  # {elements:,} elements"
    if fusion:
        yield f"{len(fusion)} extra 8-bit tensors, outside the budget, so that integer kernels fuse"
        yield from (f"  # {activation.tensor}: {elements:,} elements" for activation, elements in fusion)
    if network.weight_only:
        yield f"{len(network.weight_only)} weight tensors quantized outside search and budget"
    for alone in network.weight_only:
        figures = f"{alone.op_type}, {alone.elements:,} weights, {'x'.join(map(str, alone.shape))}"
        yield f"  {pin_of(alone.tensor, BITS)}  # {figures}: {alone.reason}"
    skipped = (*network.skipped, *left_by_plan(network))
    yield f"left in float: {len(skipped)} nodes"
    yield from (f"  {line}" for line in skip_lines(skipped, verbose))
    total = sum(result.seconds.values())
    steps = ", ".join(f"{step_name(name)} {s:.0f}" for name, s in result.seconds.items() if s >= _SHOWN * total)
    origin = "synthetic samples" if result.source == "synthetic" else f"samples from {result.source}"
    yield f"about {_duration(total)} with {result.samples} {origin} (seconds: {steps})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
