"""The best rounding of each channel and the best clipping of each activation, at each width."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.curves.float_fallback import in_float
from rdoq_onnx.curves.measurement import MeasuredActivation, MeasuredLayer, Measurement, Unheld, curves_of
from rdoq_onnx.curves.shrinkage import expected, picked, squared_errors, steadied
from rdoq_onnx.model.layers import Activation
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.probing.distortions import Distortions

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """All candidates and what was measured of each; draws: the values of ⟨g, Δ⟩² that each figure is the mean of."""

    candidates: Candidates
    distortions: Distortions
    draws: int


def select(
    source: onnx.ModelProto, network: Network, observation: Observation, measured: Measured, lost: Unheld
) -> Measurement:
    """The best variant of rounding for each channel and width, the best clipping for each activation and width.

    lost: what stays in float.
    """
    left = in_float(network, lost)
    widths, missing = measured.candidates.widths, measured.distortions.missing
    found = zip(measured.candidates.layers, measured.distortions.weights, strict=True)
    layers = [
        _best_rounding(network, candidates, distortion, widths, measured.draws)
        for candidates, distortion in found
        if candidates.layer.name not in lost.layers
    ]
    kept = {a.tensor: a for a in left.activations}
    pairs = zip(measured.candidates.activations, measured.distortions.activations, strict=True)
    activations = [
        _best_clipping(kept[c.activation.tensor], c, values) for c, values in pairs if c.activation.tensor in kept
    ]
    curves = curves_of(left, observation, widths, [curve for _, curve in layers], [curve for _, curve in activations])
    return Measurement(
        source, left, observation, tuple(x for x, _ in layers), tuple(a for a, _ in activations), curves, lost, missing
    )


def _best_rounding(
    network: Network, candidates: LayerCandidates, found: Float, widths: tuple[int, ...], draws: int
) -> tuple[MeasuredLayer, Float]:
    """The best variant of each channel at each width, and their curves [units, widths]."""
    likely = expected(found, draws)
    best = likely.argmin(axis=0)
    chosen = [picked([v[k] for v in candidates.variants], best[:, k]) for k in range(len(widths))]
    errors = squared_errors(chosen, network.rows(candidates.layer))
    layer = MeasuredLayer(candidates.layer, dict(zip(widths, chosen, strict=True)), candidates.mean)
    return layer, steadied(np.take_along_axis(likely, best[None], axis=0)[0], errors, draws)


def _best_clipping(
    activation: Activation, candidates: ActivationCandidates, values: Mapping[int, Float]
) -> tuple[MeasuredActivation, dict[int, float]]:
    """The best quantizer of each width, and the curve by width."""
    best = {bits: int(np.argmin(v)) for bits, v in values.items()}
    quantizers = {bits: candidates.table[bits][k] for bits, k in best.items()}
    return MeasuredActivation(activation, quantizers), {bits: float(values[bits][k]) for bits, k in best.items()}
