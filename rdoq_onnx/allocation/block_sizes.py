"""Choose how many weights of a layer share a scale.

A layer l with blocks of g weights takes 16 bits for each scale, beside the bits of its weights. Its curves with g and
those without compete as a whole, since the layer is stored in one form:

    g(lambda) = sum_l min_g sum_u min_w [d_g(u, w) + lambda * r_g(u, w)] - lambda * B
    bound     = max_lambda g(lambda)  <=  optimum

over the channels u of a layer, as in allocate.py. The blocks are those at the least lambda whose rate is within B; the
widths are then allocated anew, with the blocks fixed.

With --storage nbits a layer whose channels have several widths is computed in groups, and a Gather brings these back
into order. That takes time, so a layer may also have one width for all of its channels, and

    min_g min( min_w sum_u [d_g(u, w) + lambda * r_g(u, w)],  sum_u min_w [...] + lambda * GROUPED )

is what it takes. The bound does without the price.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.curves.measurement import BlockOption, MeasuredLayer, Measurement, block_bits, with_blocks
from rdoq_onnx.model.layers import Layer

Float = NDArray[np.float64]

# Bits of weights that are read in the time of a Concat and a Gather: 20 us beside 75 us for 576 x 1,536 weights of 4
# bits (ONNX Runtime 1.32, batch of 1, AVX2).
GROUPED = 1e6
_STEPS = 60  # of the bisection, over a factor of _RANGE
_RANGE = 1e24


@dataclass(frozen=True)
class _Choice:
    """The points of a layer's option: distortion and rate of each unit at each width, [units, widths].

    whole: one unit stands for all channels. price: in bits, that count for the choice alone.
    """

    option: int
    distortion: Float
    rate: Float
    whole: bool = False
    price: float = 0.0

    def at(self, slope: float) -> tuple[float, float]:
        """Return the least Σ δ + λ·rate, and the rate there."""
        cost = self.distortion + slope * self.rate
        best = cost.argmin(axis=1)
        rows = np.arange(len(best))
        return float(cost[rows, best].sum()), float(self.rate[rows, best].sum())


@dataclass(frozen=True)
class Room:
    """What weights may take: bits of all, and of a layer's; groups: whether several widths in a layer have a price."""

    budget: int
    layer_limit: int | None = None
    groups: bool = False


def choose_blocks(measurement: Measurement, allowed: NDArray[np.bool_], room: Room) -> tuple[Measurement, float]:
    """Return `measurement` with one of the options of each layer, and a lower bound on the distortion of any choice.

    allowed [U, W]: widths of each row of the curves.
    """
    layers = []
    for each, rows in zip(measurement.layers, measurement.unit_rows(), strict=True):
        choices = _within(_choices(measurement, each, rows, allowed), room.layer_limit)
        layers.append(_priced(choices) if room.groups and in_groups(each.layer) else choices)
    budget = room.budget
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
    found = chosen(measurement, [layer[k].option for layer, k in zip(layers, picked, strict=True)])
    whole = [layer[k].whole for layer, k in zip(layers, picked, strict=True)]
    return _with_ties(found, whole) if any(whole) else found, bound


def in_groups(layer: Layer) -> bool:
    """Whether --storage nbits computes a layer in groups of channels of one width, or looks up rows of one width."""
    linear = layer.linear
    return layer.looked_up or (linear.op_type == "MatMul" and linear.weight_side == 1 and len(linear.shape) == 2)


def _with_ties(measurement: Measurement, whole: Sequence[bool]) -> Measurement:
    """Tie the channels of each layer that is `whole`."""
    tied = np.arange(len(measurement.curves.elements))
    for each, rows in zip(whole, measurement.unit_rows(), strict=True):
        if each:
            tied[rows] = rows.start
    return replace(measurement, curves=replace(measurement.curves, tied=tied))


def _priced(choices: Sequence[_Choice]) -> list[_Choice]:
    """Return each choice at one width for all channels, if one is allowed to all, and at the price of groups."""
    result = []
    for each in choices:
        distortion, rate = (v.sum(axis=0, keepdims=True) for v in (each.distortion, each.rate))
        if np.isfinite(distortion).any():
            result.append(replace(each, distortion=distortion, rate=rate, whole=True))
        result.append(replace(each, price=GROUPED))
    return result


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
    """Return the index of the best choice of each layer at a slope λ, their rate, and the dual value without prices."""
    picked, rates, costs = [], [], []
    for choices in layers:
        each = [c.at(slope) for c in choices]
        priced = [cost + slope * c.price for (cost, _), c in zip(each, choices, strict=True)]
        best = int(np.argmin(priced))
        picked.append(best)
        rates.append(each[best][1])
        costs.append(min(cost for cost, _ in each))
    return picked, sum(rates), sum(costs) - slope * budget
