"""Scales of activation channels: one quantizer for all channels of x / r loses less than one for x.

The product x W = (x / r)(r W) is exact for any r > 0. With r the step s of the quantizer falls, but rows of W, which
have one step each, widen (Xiao et al., SmoothQuant, ICML 2023). To first order, with rounding errors independent and
uniform over a step, g the gradient of the output at each element (supplement, Eq. 3) and c a channel:

    activation   δ_a = s(r)² / 12 · Σ_c r_c² E[g_c²],       s(r) = range of x / r over 2^b - 1
    weights      δ_w = Σ_j t_j(r)² / 12 · E[g_j²] Σ_c E[x_c²] / r_c²,       t_j(r) = max |W_j r| over 2^(b-1) - 1

r is a product of powers of the channels' ranges and of the weights' magnitudes; the powers of least δ_a + δ_w are
chosen for each group of tensors that share r. Powers of 0, no scales, are among them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.absorbing import Place
from rdoq_onnx.candidates.channel_labels import Labels
from rdoq_onnx.candidates.channel_sums import Measures, measure
from rdoq_onnx.candidates.scale_groups import ScaleGroup, find_groups
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.observation.equalization import typical_widths
from rdoq_onnx.observation.shapes import shapes_of
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.scale_channels import ScaleChannels

Float = NDArray[np.float64]

_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of ranges, and of the inverse magnitudes of weights
_QUIET = 1e-3  # channels below this share of the widest range count as this wide: they may be dead on these samples
_GAIN = 0.05  # least share of a group's δ that scales must save
_ROWS = 512  # rows of a weight that its δ is estimated from
_NOTABLE = 1e-5  # least share of the signal's power that a Mul must save (50 dB)
_MUL = 0.01  # least share of the network's δ that a Mul must save, which takes time


def scale_channels(network: Network, config: Config, plan: ReversePlan, samples: Samples) -> Network:
    """Scale the channels of activations where the curves gain by it; the outputs of `network` stay the same.

    plan: reverse passes over some of `samples`.
    """
    groups = find_groups(network, shapes_of(network.model, samples, plan.runtime))
    measures = measure(groups, plan)
    groups = [g for g in groups if all(p.name in measures.tensors for p in g.tensors)]
    choices = [Choice.of(g, measures, network, typical_widths(config)) for g in groups]
    total = sum(sum(c.before) for c in choices)
    least = _NOTABLE * plan.metric.power * plan.metric.elements * measures.runs
    integer = _integer_outputs(network) if typical_widths(config)[0] == MAX_BITS else set()
    chosen = [c for c in choices if c.pays(total, least) and integer.isdisjoint(p.name for p in c.group.multiplied)]
    if not chosen:
        return network
    return analyse(run_passes([c.rewrite() for c in chosen], network.model), config.selection)


def _integer_outputs(network: Network) -> set[str]:
    """The outputs of each HardSwish computed on integers, which a Mul behind it would put an end to."""
    nodes = network.model.graph.node
    return {n.output[0] for n in nodes if n.op_type == "HardSwish" and n.input[0] in network.hard_swish_inputs}


@dataclass(frozen=True)
class Choice:
    """The best scales of a group. before, after: its δ without and with them, activations and weights."""

    group: ScaleGroup
    scales: Float
    before: tuple[float, float]
    after: tuple[float, float]

    @classmethod
    def of(cls, group: ScaleGroup, measures: Measures, network: Network, bits: tuple[int, int]) -> "Choice":
        """Try all powers. bits: of activations and weights."""
        model = _Model.of(group, measures, network, bits)
        tried = [(sum(model.loss(r)), k, r) for k, r in enumerate(model.scales())]
        _, _, best = min(tried, key=lambda each: each[:2])
        return cls(group, best, model.loss(np.ones(group.channels)), model.loss(best))

    def pays(self, total: float, least: float) -> bool:
        """Whether the scales gain enough. total: δ of all groups; least: what a Mul must save."""
        before, after = sum(self.before), sum(self.after)
        needed = _GAIN * before if not self.group.multiplied else max(_GAIN * before, _MUL * total, least)
        return before - after > needed

    def rewrite(self) -> ScaleChannels:
        """Return the pass that applies the scales."""
        group = self.group

        def factor(place: Place) -> Float:
            return np.append(self.scales, 1.0)[place.labels] ** place.power

        def inputs(places: Sequence[Place]) -> dict[tuple[str, int], Float]:
            """Queries and keys may be columns of one weight, which then absorbs the product of both factors."""
            factors: dict[tuple[str, int], Float] = {}
            for place in places:
                key = place.name, place.index
                factors[key] = factors.get(key, 1.0) * factor(place)
            return factors

        multiplied = {p.name: factor(p) for p in group.multiplied}
        return ScaleChannels(inputs(group.constants), multiplied, inputs(group.operands))


@dataclass(frozen=True)
class _Model:
    """δ of a group as a function of r."""

    group: ScaleGroup
    measures: Measures
    rows: Sequence[tuple[Float, Labels, Float]]  # |W| [rows, weights], labels of the same shape, E[g²] [rows]
    bits: tuple[int, int]

    @classmethod
    def of(cls, group: ScaleGroup, measures: Measures, network: Network, bits: tuple[int, int]) -> "_Model":
        rows = []
        for layer, place in group.layers:
            if layer.name in measures.layers:
                weights = np.abs(network.rows(layer))
                some = np.linspace(0, len(weights) - 1, min(len(weights), _ROWS)).astype(int)
                labels = layer.linear.rows(np.broadcast_to(place.labels, layer.linear.shape))
                share = len(weights) / len(some)
                rows.append((weights[some], labels[some], measures.layers[layer.name][some] * share))
        return cls(group, measures, rows, bits)

    def scales(self) -> Iterator[Float]:
        ranges = self._ranges()
        magnitudes = np.zeros(self.group.channels)
        for weights, labels, _ in self.rows:
            np.maximum.at(magnitudes, labels[labels >= 0], weights[labels >= 0])
        for a, b in product(_POWERS, _POWERS):
            r = _spread(ranges) ** a / _spread(magnitudes) ** b
            yield r / np.exp(np.log(r).mean())

    def _ranges(self) -> Float:
        """The range of each channel: of an operand k, whose scale is inverse, relative to that of q."""
        ranges = np.ones(self.group.channels)
        for place in self.group.tensors:
            sums = self.measures.tensors[place.name]
            peaks = _spread(np.maximum(sums.high, -sums.low))
            ranges *= peaks ** (-place.power)
        return ranges ** (1 / len(self.group.tensors))

    def loss(self, r: Float) -> tuple[float, float]:
        activations = 0.0
        for place in self.group.tensors:
            sums, power = self.measures.tensors[place.name], r ** (-place.power)
            span = max((sums.high / power).max(), 0.0) - min((sums.low / power).min(), 0.0)
            step = span / (2 ** self.bits[0] - 1)
            activations += step**2 / 12 * float((power**2 * sums.sensitivity).sum())
        return activations, sum(self._weights(r, *each) for each in self.rows)

    def _weights(self, r: Float, weights: Float, labels: Labels, gradient: Float) -> float:
        sums = self.measures.tensors[self.group.tensors[0].name]
        scales, second = np.append(r, 1.0), np.append(sums.power / r**2, 0.0)
        steps = (weights * scales[labels]).max(axis=1) / (2 ** (self.bits[1] - 1) - 1)
        return float((steps**2 / 12 * gradient * second[labels].sum(axis=1)).sum())


def _spread(values: Float) -> Float:
    return np.maximum(values, max(_QUIET * values.max(initial=0.0), 1e-30))
