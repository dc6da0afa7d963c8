"""Choose how many weights of a layer share a scale.

A layer l with blocks of g weights takes 16 bits for each scale, beside the bits of its weights. Its curves with g and
those without compete as a whole, since the layer is stored in one form:

    g(lambda) = sum_l min_g sum_u min_w [d_g(u, w) + lambda * r_g(u, w)] - lambda * B
    bound     = max_lambda g(lambda)  <=  optimum

over the channels u of a layer, as in allocate.py. The blocks are those at the least lambda whose rate is within B; the
widths are then allocated anew, with the blocks fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.curves.measurement import BlockOption, MeasuredLayer, Measurement, block_bits, with_blocks

Float = NDArray[np.float64]

_STEPS = 60  # of the bisection, over a factor of _RANGE
_RANGE = 1e24


@dataclass(frozen=True)
class _Choice:
    """The points of a layer's option: distortion and rate of each unit at each width, [units, widths]."""

    option: int
    distortion: Float
    rate: Float

    def at(self, slope: float) -> tuple[float, float]:
        """Return the least Σ δ + λ·rate, and the rate there."""
        cost = self.distortion + slope * self.rate
        best = cost.argmin(axis=1)
        rows = np.arange(len(best))
        return float(cost[rows, best].sum()), float(self.rate[rows, best].sum())


def choose_blocks(
    measurement: Measurement, allowed: NDArray[np.bool_], budget: int, layer_limit: int | None = None
) -> tuple[Measurement, float]:
    """Return `measurement` with one of the options of each layer, and a lower bound on the distortion of any choice.

    allowed [U, W]: widths of each row of the curves. budget: bits of all weights; layer_limit: bits of a layer's.
    """
    layers = [
        _within(_choices(measurement, each, rows, allowed), layer_limit)
        for each, rows in zip(measurement.layers, measurement.unit_rows(), strict=True)
    ]
    greatest = max((float(c.distortion[np.isfinite(c.distortion)].max()) for x in layers for c in x), default=0.0)
    low, high = np.log(max(greatest, 1e-300) / _RANGE), np.log(max(greatest, 1e-300))
    picked, _, bound = _relaxed(layers, float(np.exp(high)), budget)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        tried, rate, dual = _relaxed(layers, float(np.exp(middle)), budget)
        bound = max(bound, dual)
        if rate <= budget:
            high, picked = middle, tried
        else:
            low = middle
    return chosen(measurement, picked), bound


def fewest_scales(measurement: Measurement) -> Measurement:
    """Return `measurement` with the fewest scales that its layers offer, one for each channel if they may."""
    if not any(each.options for each in measurement.layers):
        return measurement
    bits = [[block_bits(x.layer, o.size) for o in x.options] for x in measurement.layers]
    return chosen(measurement, [int(np.argmin(each)) if each else 0 for each in bits])


def chosen(measurement: Measurement, picked: Sequence[int]) -> Measurement:
    """Return `measurement` with the option `picked` of each layer; a layer without options stays as it is."""
    distortion = measurement.curves.distortion.copy()
    layers = list(measurement.layers)
    for k, (each, rows) in enumerate(zip(measurement.layers, measurement.unit_rows(), strict=True)):
        if each.options:
            option = each.options[picked[k]]
            distortion[rows] = option.distortion
            layers[k] = replace(each, codes=option.codes, block=option.size)
    return with_blocks(measurement, layers, distortion)


def _choices(measurement: Measurement, layer: MeasuredLayer, rows: slice, allowed: NDArray[np.bool_]) -> list[_Choice]:
    """Return what a layer's options give, each unit at the widths `allowed`."""
    curves = measurement.curves
    options = layer.options or (BlockOption(layer.block, layer.codes, curves.distortion[rows]),)
    weights = (curves.elements[rows, None] * curves.widths).astype(np.float64)
    return [
        _Choice(k, np.where(allowed[rows], o.distortion, np.inf), weights + block_bits(layer.layer, o.size))
        for k, o in enumerate(options)
    ]


def _within(choices: list[_Choice], limit: int | None) -> list[_Choice]:
    """Leave out what exceeds `limit` bits at the narrowest widths, if anything is left then."""
    if limit is None:
        return choices
    fits = [c for c in choices if np.where(np.isfinite(c.distortion), c.rate, np.inf).min(axis=1).sum() <= limit]
    return fits or choices


def _relaxed(layers: Sequence[Sequence[_Choice]], slope: float, budget: int) -> tuple[list[int], float, float]:
    """Return the best option of each layer at a slope λ, their rate, and the dual value."""
    picked, rates, costs = [], [], []
    for choices in layers:
        each = [(*c.at(slope), c.option) for c in choices]
        cost, rate, option = min(each)
        picked.append(option)
        rates.append(rate)
        costs.append(cost)
    return picked, sum(rates), sum(costs) - slope * budget
