"""Curves of layers and activations without an adjoint: exact (Eq. 7 and 8) if affordable, else approximated.

All channels of a layer at all widths take many runs of the part behind it. If these are too many, each channel is
measured at one width only, on as many samples as affordable, and

    δ_j(b) = E‖Δz_j(b)‖² · δ_j(b₀) / E‖Δz_j(b₀)‖²

which is first order in the size of the channel's error, with an exact gain of the network. If even that is too much,
the gain of the whole layer's error stands in for that of each channel.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.probe import Prober, exact_activation, exact_layer
from rdoq_onnx.system.progress import Advance

_WORK = 3 * 10**10  # elements that each kind of run may compute; under a minute of convolutions
_MIN_SAMPLES = 4  # of an activation, at any cost
_WIDTH = 4  # b₀; the nearest of the offered widths is used

Float = NDArray[np.float64]


def lost_parts(measured: Distortions, candidates: Candidates) -> tuple[list[int], list[int]]:
    """Return the indices of the layers, and of the activations, whose curves are missing from `measured`."""
    lost = measured.missing
    layers = [k for k, each in enumerate(candidates.layers) if any(u.output in lost for u in each.layer.uses)]
    return layers, [k for k, each in enumerate(candidates.activations) if each.activation.tensor in lost]


def complete(
    measured: Distortions, candidates: Candidates, prober: Prober, cost: int, advance: Advance, work: int = _WORK
) -> Distortions:
    """Fill in the curves missing from `measured`; `advance(1)` after each layer and activation of `lost_parts`.

    cost: elements of all tensors computed in a run of one sample. work: elements that all runs may compute.
    """
    layers, activations = lost_parts(measured, candidates)
    weights, values = list(measured.weights), list(measured.activations)
    channels = sum(candidates.layers[k].layer.linear.channels for k in layers)
    quantizers = sum(len(candidates.activations[k].flat) for k in activations)
    count, affordable = len(prober.samples), work // cost
    all_fit = (sum(weights[k].size for k in layers) + quantizers) * count <= affordable

    def limited(most: int) -> Prober:
        return replace(prober, samples=prober.samples.some(most))

    few = affordable // max(channels, 1)
    single = limited(few) if few else None
    for k in layers:
        layer = candidates.layers[k]
        weights[k] = exact_layer(prober, layer) if all_fit else _scaled(layer, candidates.widths, prober, single)
        advance(1)
    some = prober if all_fit else limited(max(_MIN_SAMPLES, affordable // max(quantizers, 1)))
    for k in activations:
        values[k] = exact_activation(some, candidates.activations[k])
        advance(1)
    return replace(measured, weights=tuple(weights), activations=tuple(values))


def _scaled(candidates: LayerCandidates, widths: Sequence[int], prober: Prober, single: Prober | None) -> Float:
    """Derive δ from the power of Δz, [variants, units, widths].

    single: measures each channel separately, at one width; None to measure only the layer as a whole.
    """
    layer, variants, mean = candidates.layer, candidates.variants, candidates.mean
    probed = [variants[0][int(np.argmin(np.abs(np.asarray(widths) - _WIDTH)))]]
    if single is None:
        gain = prober.whole_layer(layer, probed, mean) / np.maximum(prober.powers(layer, probed, mean).sum(), 1e-300)
    else:
        power, exact = single.powers(layer, probed, mean), single.layer(layer, probed, mean)
        changed = power > 0  # a channel that b₀ bits represent exactly gets the mean gain of the others
        gain = np.where(changed, exact / np.where(changed, power, 1.0), exact.sum() / max(power.sum(), 1e-300))
    return np.stack([gain * prober.powers(layer, codes, mean) for codes in variants])
