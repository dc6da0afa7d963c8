"""Which rounding errors of a layer the network's output sees: second moments of its gradient by the layer's weights.

To first order (supplement, Eq. 3) rounding errors ΔW_j of channel j, bias corrected, distort the output by

    δ = ΔW_jᵀ F_j ΔW_j / D,    F_j = E[∇_j ∇_jᵀ],    ∇_j = Σ_p g_jp (x_p - E[x])

which is the curve that will be measured, as a quadratic form. The sum over positions p is inside the square: errors
that all positions share add up, others average out, and the covariance of single positions cannot tell them apart.
One channel's F_j has no more rank than there are samples, so that the layer's channels share the sum F = Σ_j F_j, and
rounding mixes it with the covariance (moments.py).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis import Layer, Network
from rdoq_onnx.backward import Backward, Pass
from rdoq_onnx.distortion import Metric
from rdoq_onnx.moments import Moments, in_parts
from rdoq_onnx.parallel import Workers
from rdoq_onnx.progress import Advance
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples
from rdoq_onnx.taylor import use_gradients

Float = NDArray[np.float64]


def with_sensitivity(
    moments: Sequence[Moments],
    network: Network,
    samples: Samples,
    metric: Metric,
    runtime: Runtime,
    *,
    batch: int,
    seed: int,
    workers: Workers,
    advance: Advance,
    around: onnx.ModelProto | None = None,
) -> tuple[Moments, ...]:
    """`moments` of the layers of `network` with F from one reverse pass over `samples`.

    Layers that have one position a sample, where F tells little that the covariance does not, keep theirs, and so do
    layers whose outputs have no adjoint, or none that is finite. around: as for `taylor.first_order`.
    """
    backward = Backward.of(network, samples, metric, runtime, batch, around)
    kept = [k for k, layer in enumerate(network.layers) if not backward.lost(layer)]
    sums: dict[int, Float] = {}

    def add(k: int, done: Pass) -> None:
        found = _second(network.layers[k], moments[k], done, backward)
        if found is not None:
            sums[k] = sums[k] + found if k in sums else found

    count = 0
    for done in backward.passes(samples, seed, exact=False):
        workers.map(lambda k, done=done: add(k, done), kept)  # type: ignore[misc]
        count += done.count
        advance(done.count)
        del done  # or two passes would be in memory while the next one runs
    known = {k: f / count for k, f in sums.items() if np.isfinite(f).all()}
    return tuple(replace(m, sensitivity=known[k]) if k in known else m for k, m in enumerate(moments))


def _second(layer: Layer, moments: Moments, done: Pass, backward: Backward) -> Float | None:
    """Σ over the samples of one batch and the channels of ∇ ∇ᵀ, [G·parts, B, B]; None at one position a sample."""
    mean = moments.mean.astype(np.float32)[..., None]
    pairs = [use_gradients(use, done, backward.reverse.adjoints) for use in layer.uses]
    centred = [(x - mean, g) for x, g in pairs]
    _, _, channels, positions = pairs[0][1].shape
    if positions == 1:
        return None
    total: Float | None = None
    for sample in range(done.count):
        several = [(x[sample], g[sample]) for x, g in centred]
        if len(several) == 1 and positions < channels:
            # ∇ᵀ∇ = X (gᵀ g) Xᵀ is the shorter way.
            x, g = several[0]
            parts = in_parts(x)
            inner = np.repeat(g.swapaxes(1, 2) @ g, len(parts) // len(g), axis=0)
            found = parts @ inner @ parts.swapaxes(1, 2)
        else:
            parts = in_parts(sum(x @ g.swapaxes(1, 2) for x, g in several))
            found = parts @ parts.swapaxes(1, 2)
        total = found.astype(np.float64) if total is None else total + found
    return total
