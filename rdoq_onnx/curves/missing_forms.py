"""Forms of large layers without an adjoint: those of the layer's own output, times one exact gain of the network.

Without g, all channels are taken to have the same gain, and errors at different positions to be independent:

    δ_j ≈ γ ΔW_jᵀ C ΔW_j,    γ = δ / Σ_j ΔW_jᵀ C ΔW_j

with the covariance C of the layer's input, and δ measured exactly for the whole layer rounded to full width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.candidates.statistics import Statistics
from rdoq_onnx.curves.forms import Form, kept_form
from rdoq_onnx.curves.layer_work import LayerWork
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.probing.probe import Prober

Array = NDArray[Any]


def form_of(statistics: Statistics, layer: Layer) -> Form:
    """Return the forms of a layer: those measured by reverse passes, or of its output if it has no adjoint."""
    if statistics.has("powers", layer):
        return kept_form(statistics, layer)
    gain = float(statistics.get("gain", layer)[0]) if statistics.has("gain", layer) else 1.0
    return output_form(layer, statistics.moments(layer), statistics.basis(layer), gain)


def output_form(layer: Layer, moments: Moments, basis: Array, gain: float) -> Form:
    """Return `gain` times the forms of a layer's output."""
    blocks = Blocks(layer.linear)
    rows = layer.linear.channels if blocks.shared else layer.linear.channels // layer.linear.group
    variances = np.einsum("gkb,gkb->gb", moments.covariance @ basis, basis)
    powers = np.full((len(basis), rows, 1), gain, np.float32)
    return Form(blocks, basis, powers, np.maximum(variances, 0)[:, None])


def lacks_gain(statistics: Statistics, layer: Layer) -> bool:
    """Whether a layer has no form, and its gain is not measured yet."""
    return not statistics.has("powers", layer) and not statistics.has("gain", layer)


def measured_gain(work: LayerWork, moments: Moments, widths: Sequence[int], prober: Prober) -> float:
    """Return the gain of a layer whose forms have a gain of 1, at the widest of `widths` that changes a weight."""
    for bits in sorted(widths, reverse=True):
        (rounded,) = work.nearest(work.all, moments.covariance, (bits,))
        predicted = float(rounded.curves.sum())
        if predicted > 0:
            (exact,) = prober.whole_layer(work.layer, [rounded.codes], moments.mean)
            return float(exact) / predicted
    return 1.0
