"""List what a run would quantize, and estimate its time, memory and scratch space.

A few samples run, and passes are timed. Of a model with detached weights nothing runs and no weight is read: sizes come
from shape inference, and the time of a pass from its multiplications.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.float_constants import left_by_plan
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import Model, read_normalized
from rdoq_onnx.analysis.skips import presumed_finite
from rdoq_onnx.calibration.supplied import described
from rdoq_onnx.candidates.candidates import widest
from rdoq_onnx.config import Config
from rdoq_onnx.cost.early import sizes_of
from rdoq_onnx.cost.template import template
from rdoq_onnx.curves.float_fallback import in_float, not_quantized
from rdoq_onnx.curves.measurement import activation_elements
from rdoq_onnx.curves.stores import scratch_for
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.estimate.expected import estimated
from rdoq_onnx.estimate.space import Space, shortages, space
from rdoq_onnx.model.external import is_detached
from rdoq_onnx.observation.inputs import batched, samples_for
from rdoq_onnx.report.wording import about_bytes, duration, pin_of, skip_lines, step_name
from rdoq_onnx.system.runtime import Runtime


@dataclass(frozen=True)
class DryRun:
    """What a run would quantize. elements: of each activation, per sample.

    seconds: estimate for each step. space: estimated bytes. shortages: what the run probably lacks.
    """

    network: Network
    elements: tuple[int, ...]
    samples: int
    source: str
    supplied: tuple[str, ...]
    seconds: Mapping[str, float]
    space: Space
    shortages: tuple[str, ...] = ()


def dry_run(model: Model, calibration: Any, config: Config) -> DryRun:
    """Read and analyse the model, and run a few samples unless its weights are detached.

    Raises what a run would raise up to there.
    """
    begin = time.perf_counter()
    runtime = Runtime(config.provider, config.threads)
    scratch = scratch_for(config, None)
    normal = read_normalized(model, scratch.shelf, config.selection.activations)[1]
    network = analyse(normal, config.selection, presumed_finite)
    samples, detached = samples_for(normal, calibration, config), is_detached(normal)
    reading = time.perf_counter() - begin
    if not detached:
        samples = batched(network, normal, samples, runtime)
    estimate, samples = estimated(network, samples, config, runtime, reading)
    work, seconds = estimate.work, estimate.steps()
    needed = space(work, scratch.shelf.size)
    sizes = work.observation.sizes
    network = in_float(network, not_quantized(network, config, sizes))
    elements = tuple(activation_elements(a, sizes) for a in network.activations)
    found, warnings = (samples.source, samples.supplied), shortages(needed, config, scratch)
    return DryRun(network, elements, len(samples), *found, seconds, needed, warnings)


def template_of(model: Model, calibration: Any, config: Config) -> str:
    """Return the rows that `--cost FILE` takes for `model`, filled with the cost of `config`.

    Raises ConfigError if that cost must be measured.
    """
    if config.cost is not None and config.cost.unmeasured:
        raise ConfigError("--cost measured times the quantized model: give OUTPUT too")
    runtime = Runtime(config.provider, config.threads)
    normal = read_normalized(model, scratch_for(config, None).shelf, config.selection.activations)[1]
    network = analyse(normal, config.selection)
    if config.cost is None or config.cost.rows:
        return template(network, {}, config.cost)
    samples = batched(network, normal, samples_for(normal, calibration, config), runtime)
    return template(network, sizes_of(network, samples, runtime), config.cost)


_SHOWN = 0.02  # minimum share of the time for a step to be named


def lines(result: DryRun, verbose: bool = False) -> Iterator[str]:
    """Word layers, activations, what stays in float and why, and the estimates; `verbose`: every node in float."""
    network = result.network
    channels = sum(layer.linear.channels for layer in network.searched)
    weights = sum(int(np.prod(layer.linear.shape)) for layer in network.searched)
    found = f"{len(network.searched)} layers, {channels:,} channels, {weights:,} weights"
    yield f"{found} ({weights / 250:,.1f} kB in float)"
    bits = widest(network)
    for layer in network.searched:
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
    for tie in network.ties:
        yield f"  # {tie.table.name}: a table that has the integers of {tie.layer}"
    skipped = (*network.skipped, *left_by_plan(network))
    yield f"left in float: {len(skipped)} nodes"
    yield from (f"  {line}" for line in skip_lines(skipped, verbose))
    if result.supplied:
        yield f"inputs that the samples lack: {described(result.supplied)}"
    yield from (f"warning: {text}" for text in result.shortages)
    yield _estimate(result)


def _estimate(result: DryRun) -> str:
    """Word the estimated time, memory and scratch space."""
    total = sum(result.seconds.values())
    steps = ", ".join(f"{step_name(name)} {s:.0f}" for name, s in result.seconds.items() if s >= _SHOWN * total)
    origin = "synthetic samples" if result.source == "synthetic" else f"samples from {result.source}"
    scratch = f" and {about_bytes(result.space.scratch)} of scratch space" if result.space.scratch else ""
    needs = f"{duration(total)}, {about_bytes(result.space.memory)} of memory{scratch}"
    return f"about {needs} with {result.samples} {origin} (seconds: {steps})"
