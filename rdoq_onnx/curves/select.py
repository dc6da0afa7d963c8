"""The best rounding of each channel and the best clipping of each activation, at each width."""

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import Candidates
from rdoq_onnx.curves.float_fallback import in_float
from rdoq_onnx.curves.measurement import Measurement, Unheld, curves_of
from rdoq_onnx.curves.shrinkage import expected, picked, squared_errors, steadied
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.probing.distortions import Distortions


def choose(
    source: onnx.ModelProto,
    network: Network,
    observation: Observation,
    candidates: Candidates,
    measured: Distortions,
    lost: Unheld,
    seen: int,
) -> Measurement:
    """The best variant of rounding for each channel and width, the best clipping for each activation and width.

    lost: what stays in float. seen: the draws that each curve is the mean of.
    """
    codes: list[dict[int, WeightCodes]] = []
    weights: list[NDArray[np.float64]] = []
    means = []
    for layer, mean, variants, found in zip(
        network.layers, candidates.means, candidates.weights, measured.weights, strict=True
    ):
        if layer.name in lost.layers:
            continue
        likely = expected(found, seen)
        best = likely.argmin(axis=0)
        chosen = [picked([v[k] for v in variants], best[:, k]) for k in range(len(candidates.widths))]
        errors = squared_errors(chosen, network.rows(layer))
        means.append(mean)
        codes.append(dict(zip(candidates.widths, chosen, strict=True)))
        weights.append(steadied(np.take_along_axis(likely, best[None], axis=0)[0], errors, seen))
    left = in_float(network, lost)
    kept = {a.tensor for a in left.activations}
    quantizers: list[dict[int, Affine]] = []
    activations: list[dict[int, float]] = []
    for activation, table, values in zip(
        network.activations, candidates.activations, measured.activations, strict=True
    ):
        if activation.tensor in kept:
            tightest = {bits: int(np.argmin(v)) for bits, v in values.items()}
            quantizers.append({bits: table[bits][k] for bits, k in tightest.items()})
            activations.append({bits: float(values[bits][k]) for bits, k in tightest.items()})
    curves = curves_of(left, observation, candidates.widths, weights, activations)
    return Measurement(
        source, left, observation, tuple(codes), tuple(means), (None,) * len(codes), tuple(quantizers), curves,
        lost, measured.missing,
    )
