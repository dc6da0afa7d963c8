"""Quantize every channel and activation at every width, exactly as it would be emitted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.activations import affine_candidates, hard_swish_candidates
from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates, integer_limit
from rdoq_onnx.candidates.layer_rows import LayerRows
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.candidates.scale_floors import scale_floors
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.layers import FUSION_BITS
from rdoq_onnx.system.threads import Workers

Float = NDArray[np.float64]
Rows = NDArray[np.floating[Any]]


def make_candidates(
    network: Network,
    widths: tuple[int, ...],
    ranges: Mapping[str, tuple[float, float]],
    moments: Sequence[Moments],
    workers: Workers,
    *,
    uncertain: bool = False,
) -> Candidates:
    """Quantize all layers and activations of `network`.

    widths: those offered to weight channels. ranges: least and greatest value of each activation on the samples.
    moments: of each layer's input. uncertain: there are too few samples to clip ranges.
    """
    probabilities = {o for n in network.model.graph.node if n.op_type == "Softmax" for o in n.output}

    def quantizers_of(tensor: str, bits: int) -> list[Affine]:
        low, high = ranges[tensor]
        if tensor in network.hard_swish_inputs:
            return hard_swish_candidates(high, uncertain)
        return affine_candidates(low, high, bits, network.target.symmetric, uncertain, tensor in probabilities)

    quantizers = tuple(
        ActivationCandidates(
            a,
            {
                bits: tuple(quantizers_of(a.tensor, bits))
                for bits in ((FUSION_BITS,) if a.fusion else range(1, MAX_BITS + 1))
            },
        )
        for a in network.activations
    )
    limit = integer_limit(network)
    layers = [
        LayerRows(Blocks(layer.linear), network.rows(layer), limit, floor)
        for layer, floor in zip(network.layers, scale_floors(network, ranges), strict=True)
    ]
    # Largest first, so that no thread starts on it while the others run out of work.
    largest = sorted(range(len(layers)), key=lambda k: -moments[k].covariance.size * len(layers[k].rows))
    rows = {(k, block): replace(layers[k], block=block) for k in largest for block in network.layers[k].blocks}
    nearest = workers.map(lambda key: rows[key].starts(moments[key[0]].covariance, widths), list(rows))
    starts = dict(zip(rows, nearest, strict=True))
    tasks = [((k, block), variant) for k, block in rows for variant in _variants(moments[k], block)]
    codes = workers.map(lambda task: rows[task[0]].codes(task[1][0], task[1][1], starts[task[0]]), tasks)
    variants: dict[int, list[tuple[tuple[WeightCodes, ...], int]]] = {}
    for ((k, block), _), by_width in zip(tasks, codes, strict=True):
        variants.setdefault(k, []).append((tuple(by_width.values()), block))
    weights = tuple(
        LayerCandidates(layer, moments[k].mean, *map(tuple, zip(*variants[k], strict=True)))
        for k, layer in enumerate(network.layers)
    )
    return Candidates(widths, weights, quantizers)


def _variants(moments: Moments, block: int) -> tuple[tuple[Float, float], ...]:
    """Return the second moments to fit rounding under: the most damped alone for blocks, of which there are several."""
    variants = moments.variants()
    return variants[-1:] if block else variants
