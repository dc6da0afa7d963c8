"""What `--dry-run` prints: lines that can be pasted as options, each with what it stands for."""

from collections.abc import Iterator

import numpy as np

from rdoq_onnx.candidates import widest
from rdoq_onnx.dry_run import DryRun
from rdoq_onnx.report import pin_of
from rdoq_onnx.weight_only import BITS

_SHOWN = 0.02  # share of the time from which a step is named


def lines(found: DryRun) -> Iterator[str]:
    """Layers, activations, what stays in float and why, and the time."""
    network = found.network
    channels = sum(layer.linear.channels for layer in network.layers)
    weights = sum(int(np.prod(layer.linear.shape)) for layer in network.layers)
    yield f"{len(network.layers)} layers, {channels:,} channels, {weights:,} weights ({weights / 250:,.1f} kB in float)"
    bits = widest(network)
    for layer in network.layers:
        elements = int(np.prod(layer.linear.shape))
        shape = "x".join(map(str, layer.linear.shape))
        told = f"{layer.linear.op_type}, {layer.linear.channels} channels, {elements:,} weights, {shape}"
        yield f"  {pin_of(layer.name, bits)}  # {told}"
    feeding = [(a, n) for a, n in zip(network.activations, found.elements, strict=True) if not a.fusion]
    fusion = [(a, n) for a, n in zip(network.activations, found.elements, strict=True) if a.fusion]
    yield f"{len(feeding)} activations, {sum(n for _, n in feeding):,} elements a sample"
    for activation, elements in feeding:
        yield f"  {pin_of(activation.tensor, 8)}  # {elements:,} elements"
    if fusion:
        yield f"{len(fusion)} tensors at 8 bits outside the budget, so that integer kernels fuse"
        yield from (f"  # {activation.tensor}: {elements:,} elements" for activation, elements in fusion)
    if network.weight_only:
        yield f"{len(network.weight_only)} tensors quantized in their weights alone, outside search and budget"
    for alone in network.weight_only:
        told = f"{alone.op_type}, {alone.elements:,} weights, {'x'.join(map(str, alone.shape))}: {alone.reason}"
        yield f"  {pin_of(alone.tensor, BITS)}  # {told}"
    yield f"left in float: {len(network.skipped)} nodes"
    yield from (f"  {skip.op_type} {skip.node}: {skip.reason}" for skip in network.skipped)
    total = sum(found.seconds.values())
    steps = ", ".join(f"{name} {s:.0f}" for name, s in found.seconds.items() if s >= _SHOWN * total)
    yield f"about {_duration(total)} with {found.samples} samples from {found.source} (seconds: {steps})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
