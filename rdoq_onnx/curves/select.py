"""Select the best rounding of each channel and the best clipping of each activation, at each width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.candidates.table_rows import TableRows
from rdoq_onnx.curves.float_fallback import in_float
from rdoq_onnx.curves.measurement import FloatFallback, MeasuredActivation, MeasuredLayer, Measurement, curves_of
from rdoq_onnx.curves.shrinkage import picked, shrunk_curves, shrunk_variants, squared_errors
from rdoq_onnx.model.layers import Activation
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.probing.distortions import Distortions

Float = NDArray[np.float64]
Layers = Sequence[tuple[MeasuredLayer, Float]]  # with the curves [units, widths] of each


@dataclass(frozen=True)
class Measured:
    """All candidates and their distortions. draws: the number of values of ⟨g, Δ⟩² that each δ averages.

    rows: of tables, by name.
    """

    candidates: Candidates
    distortions: Distortions
    draws: int
    rows: Mapping[str, TableRows]


def best_roundings(network: Network, measured: Measured) -> Layers:
    """Select the best rounding variant of each channel and width."""
    widths = measured.candidates.widths
    return [
        _best_rounding(network, candidates, distortion, widths, measured.draws)
        for candidates, distortion in zip(measured.candidates.layers, measured.distortions.weights, strict=True)
    ]


def select(
    source: onnx.ModelProto,
    network: Network,
    observation: Observation,
    layers: Layers,
    measured: Measured,
    fallback: FloatFallback,
) -> Measurement:
    """Assemble a measurement of the `layers`, with the best clipping of each activation and width.

    layers: a superset of what is searched, in that order. fallback: what stays in float.
    """
    remaining = in_float(network, fallback)
    searched = {layer.name for layer in remaining.searched}
    layers = [(each, curves) for each, curves in layers if each.layer.name in searched]
    kept = {a.tensor: a for a in remaining.activations}
    pairs = zip(measured.candidates.activations, measured.distortions.activations, strict=True)
    activations = [
        _best_clipping(kept[c.activation.tensor], c, values) for c, values in pairs if c.activation.tensor in kept
    ]
    curves = curves_of(remaining, observation, layers, [curve for _, curve in activations])
    best = tuple(x for x, _ in layers), tuple(a for a, _ in activations)
    missing, seen = measured.distortions.missing, {name: each.seen for name, each in measured.rows.items()}
    return Measurement(source, remaining, observation, *best, curves, fallback, missing, seen)


def _best_rounding(
    network: Network, candidates: LayerCandidates, distortion: Float, widths: tuple[int, ...], draws: int
) -> tuple[MeasuredLayer, Float]:
    """Return the best variant of each channel at each width, and the curves [units, widths]."""
    shrunk = shrunk_variants(distortion, draws)
    best = shrunk.argmin(axis=0)
    chosen = [picked([v[k] for v in candidates.variants], best[:, k]) for k in range(len(widths))]
    errors = squared_errors(chosen, network.rows(candidates.layer))
    layer = MeasuredLayer(candidates.layer, dict(zip(widths, chosen, strict=True)), candidates.mean)
    return layer, shrunk_curves(np.take_along_axis(shrunk, best[None], axis=0)[0], errors, draws)


def _best_clipping(
    activation: Activation, candidates: ActivationCandidates, values: Mapping[int, Float]
) -> tuple[MeasuredActivation, dict[int, float]]:
    """Return the best quantizer of each width, and the curve by width."""
    best = {bits: int(np.argmin(v)) for bits, v in values.items()}
    quantizers = {bits: candidates.table[bits][k] for bits, k in best.items()}
    return MeasuredActivation(activation, quantizers), {bits: float(values[bits][k]) for bits, k in best.items()}
