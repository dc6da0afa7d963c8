"""Curves of what has no adjoint: exact (Eq. 7 and 8) as far as that is not too much work, else near that.

A layer's channels at all widths are many runs of what lies behind it. Where they are too many, each channel is measured
at one width alone, on as many samples as the work allows, and

    δ_j(b) = E‖Δz_j(b)‖² · δ_j(b₀) / E‖Δz_j(b₀)‖²

which is first order in the channel's error and as exact as a run in what the network makes of it. Where even that is
too much, what the network makes of the whole layer's error stands for each of its channels.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.probe import Prober, exact_activation, exact_layer
from rdoq_onnx.system.progress import Advance

_WORK = 3 * 10**10  # elements that each kind of runs may compute: less than a minute of convolutions
_MIN_SAMPLES = 4  # for an activation, whatever the work
_WIDTH = 4  # b₀, or what is nearest to it of the widths there are

Float = NDArray[np.float64]


def lost_parts(measured: Distortions, candidates: Candidates) -> tuple[list[int], list[int]]:
    """Indices of the layers, and of the activations, whose curves `measured` misses."""
    lost = measured.missing
    layers = [k for k, each in enumerate(candidates.layers) if any(u.output in lost for u in each.layer.uses)]
    return layers, [k for k, each in enumerate(candidates.activations) if each.activation.tensor in lost]


def complete(
    measured: Distortions, candidates: Candidates, prober: Prober, each: int, advance: Advance, work: int = _WORK
) -> Distortions:
    """`measured` with the curves that it misses; `advance(1)` after each layer and activation of `lost_parts`.

    each: elements that a run of one sample computes, of all tensors. work: how many all runs may compute.
    """
    layers, activations = lost_parts(measured, candidates)
    weights, values = list(measured.weights), list(measured.activations)
    channels = sum(candidates.layers[k].layer.linear.channels for k in layers)
    quantizers = sum(len(candidates.activations[k].flat) for k in activations)
    count, affordable = len(prober.samples), work // each
    all_fit = (sum(weights[k].size for k in layers) + quantizers) * count <= affordable

    def on(most: int) -> Prober:
        return replace(prober, samples=prober.samples.some(most))

    few = affordable // max(channels, 1)
    alone = on(few) if few else None
    for k in layers:
        layer = candidates.layers[k]
        weights[k] = exact_layer(prober, layer) if all_fit else _scaled(layer, candidates.widths, prober, alone)
        advance(1)
    some = prober if all_fit else on(max(_MIN_SAMPLES, affordable // max(quantizers, 1)))
    for k in activations:
        values[k] = exact_activation(some, candidates.activations[k])
        advance(1)
    return replace(measured, weights=tuple(weights), activations=tuple(values))


def _scaled(candidates: LayerCandidates, widths: Sequence[int], prober: Prober, alone: Prober | None) -> Float:
    """δ from the power of Δz, [variants, units, widths].

    alone: measures each channel by itself, at one width; None where the layer is measured as a whole.
    """
    layer, variants, mean = candidates.layer, candidates.variants, candidates.mean
    known = [variants[0][int(np.argmin(np.abs(np.asarray(widths) - _WIDTH)))]]
    if alone is None:
        gain = prober.whole_layer(layer, known, mean) / np.maximum(prober.powers(layer, known, mean).sum(), 1e-300)
    else:
        power, found = alone.powers(layer, known, mean), alone.layer(layer, known, mean)
        moved = power > 0  # a channel that b₀ bits hold exactly takes the mean of the others
        gain = np.where(moved, found / np.where(moved, power, 1.0), found.sum() / max(power.sum(), 1e-300))
    return np.stack([gain * prober.powers(layer, codes, mean) for codes in variants])
