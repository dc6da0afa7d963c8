"""Select the best rounding of each channel and the best clipping of each activation, at each width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.candidates.table_rows import TableRows
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.curves.float_fallback import in_float
from rdoq_onnx.curves.measurement import (
    BlockOption,
    FloatFallback,
    MeasuredActivation,
    MeasuredLayer,
    Measurement,
    curves_of,
    with_blocks,
)
from rdoq_onnx.curves.shrinkage import picked, shrunk_curves, shrunk_variants, squared_errors
from rdoq_onnx.model.codes import WeightCodes
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
    found = Measurement(source, remaining, observation, *best, curves, fallback, missing, seen)
    return with_blocks(found, found.layers, curves.distortion)


def _best_rounding(
    network: Network, candidates: LayerCandidates, distortion: Float, widths: tuple[int, ...], draws: int
) -> tuple[MeasuredLayer, Float]:
    """Return the best variant of each channel at each width, and the curves [units, widths], of each block size."""
    blocks = np.array(candidates.blocks or [0] * len(candidates.variants))
    found = []
    for block in dict.fromkeys(blocks.tolist()):
        alike = np.flatnonzero(blocks == block)
        shrunk = shrunk_variants(distortion[alike], draws)
        best = shrunk.argmin(axis=0)
        chosen = [picked([candidates.variants[v][k] for v in alike], best[:, k]) for k in range(len(widths))]
        errors = squared_errors(chosen, network.rows(candidates.layer))
        curves = shrunk_curves(np.take_along_axis(shrunk, best[None], axis=0)[0], errors, draws)
        found.append((block, dict(zip(widths, chosen, strict=True)), curves))
    return with_options(MeasuredLayer(candidates.layer, found[0][1], candidates.mean), widths, found)


def with_options(
    layer: MeasuredLayer, widths: tuple[int, ...], found: Sequence[tuple[int, Mapping[int, WeightCodes], Float]]
) -> tuple[MeasuredLayer, Float]:
    """Give `layer` what was `found` as its options: block size, codes, and curves [units, widths] of each.

    The first stays its choice until an allocation makes another; its curves are returned.
    """
    size, codes, curves = found[0]
    options = []
    for block, theirs, values in found if len(found) > 1 else ():
        distortion = np.full((len(values), MAX_BITS + 1), np.inf)
        distortion[:, list(widths)] = values
        options.append(BlockOption(block, theirs, distortion))
    return replace(layer, codes=codes, block=size, options=tuple(options)), curves


def _best_clipping(
    activation: Activation, candidates: ActivationCandidates, values: Mapping[int, Float]
) -> tuple[MeasuredActivation, dict[int, float]]:
    """Return the best quantizer of each width, and the curve by width."""
    best = {bits: int(np.argmin(v)) for bits, v in values.items()}
    quantizers = {bits: candidates.table[bits][k] for bits, k in best.items()}
    return MeasuredActivation(activation, quantizers), {bits: float(values[bits][k]) for bits, k in best.items()}
