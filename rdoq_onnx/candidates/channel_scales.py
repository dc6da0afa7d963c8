"""Scales of activation channels: one quantizer for all channels of x / r loses less than one for x.

The product x W = (x / r)(r W) is exact for any r > 0. With r the step s of the quantizer falls, but rows of W, which
have one step each, widen (Xiao et al., SmoothQuant, ICML 2023). To first order, with rounding errors independent and
uniform over a step, g the gradient of the output at each element (supplement, Eq. 3) and c a channel:

    activation   δ_a = s(r)² / 12 · Σ_c r_c² E[g_c²],       s(r) = range of x / r over 2^b - 1
    weights      δ_w = Σ_j t_j(r)² / 12 · E[g_j²] Σ_c E[x_c²] / r_c²,       t_j(r) = max |W_j r| over 2^(b-1) - 1

r is a product of powers of the channels' ranges and of the weights' magnitudes; the powers of least δ_a + δ_w are
chosen for each group of tensors that share r. Powers of 0, no scales, are among them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.channel_labels import Labels, of_rank
from rdoq_onnx.candidates.scale_groups import Place, ScaleGroup, find_groups
from rdoq_onnx.config import Config
from rdoq_onnx.gradients.backward import Backward
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.scale_channels import ScaleChannels
from rdoq_onnx.system.runtime import Runtime

Float = NDArray[np.float64]
Array = NDArray[Any]

_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of ranges, and of the inverse magnitudes of weights
_QUIET = 1e-3  # channels below this share of the widest range count as this wide: they may be dead on these samples
_GAIN = 0.05  # least share of a group's δ that scales must save
_ROWS = 512  # rows of a weight that its δ is estimated from
_MUL = 0.01  # least share of the network's δ that a Mul must save, which takes time


@dataclass
class _Sums:
    """Per channel of a tensor: extremes, sums over elements and samples of x² and g², and the number of elements."""

    low: Float
    high: Float
    squares: Float
    sensitivity: Float
    elements: Float

    @classmethod
    def of(cls, channels: int) -> "_Sums":
        return cls(*(np.zeros(channels) for _ in range(5)))

    def add(self, values: Array, gradient: Array, labels: Labels) -> None:
        self.low = np.minimum(self.low, _reduced(np.minimum, values, labels, len(self.low)))
        self.high = np.maximum(self.high, _reduced(np.maximum, values, labels, len(self.high)))
        for total, added in (
            (self.squares, np.square(values, dtype=np.float64)),
            (self.sensitivity, np.square(gradient, dtype=np.float64)),
            (self.elements, np.ones(values.shape)),
        ):
            total += _reduced(np.add, added, labels, len(total))

    @property
    def power(self) -> Float:
        """E[x²]."""
        return self.squares / np.maximum(self.elements, 1)


def _reduced(combine: np.ufunc, values: Array, labels: Labels, channels: int) -> Float:
    """Reduce `values` over all elements of each channel, [channels]; those of no channel are left out."""
    full = of_rank(labels, values.ndim)
    axes = tuple(k for k, n in enumerate(full.shape) if n == 1)
    each = combine.reduce(values.astype(np.float64), axis=axes, keepdims=True)
    full = np.broadcast_to(full, each.shape)
    result, real = np.zeros(channels), full >= 0
    combine.at(result, full[real], each[real])
    return result


@dataclass(frozen=True)
class Measures:
    """Sums over samples: of each quantized tensor of the groups, and E[g²] of each output channel of their layers."""

    tensors: Mapping[str, _Sums]
    layers: Mapping[str, Float]


def scale_channels(network: Network, config: Config, plan: ReversePlan, samples: Samples) -> Network:
    """Scale the channels of activations where the curves gain by it; the outputs of `network` stay the same.

    plan: reverse passes over some of `samples`.
    """
    if config.activation_bits is None or not network.activations:
        return network
    groups = find_groups(network, shapes_of(network.model, samples, plan.runtime))
    measures = measure(groups, plan)
    groups = [g for g in groups if all(p.name in measures.tensors for p in g.tensors)]
    weight_bits = min(config.weight_bits or network.target.widest, network.target.widest)
    choices = [Choice.of(g, measures, network, (config.activation_bits, weight_bits)) for g in groups]
    total = sum(sum(c.before) for c in choices)
    chosen = [c for c in choices if c.pays(total)]
    if not chosen:
        return network
    return analyse(run_passes([c.rewrite() for c in chosen], network.model), config.selection)


def shapes_of(model: onnx.ModelProto, samples: Samples, runtime: Runtime) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the main graph in a run of two samples, or of as many as the model takes."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    graph = probed.graph
    names = [o for n in model.graph.node for o in n.output if o]
    graph.node.extend(helper.make_node("Shape", [name], [f"shape/{name}"], f"shape/{name}") for name in names)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=f"shape/{name}") for name in names)
    session = runtime.session(probed, "none")
    feeds = next(samples.batches(2))
    values = dict(zip(names, session.run(feeds), strict=True))
    return {
        **{name: tuple(int(n) for n in value) for name, value in values.items()},
        **{name: tuple(value.shape) for name, value in feeds.items()},
    }


def measure(groups: Sequence[ScaleGroup], plan: ReversePlan) -> Measures:
    """Collect the sums of all `groups` in reverse passes."""
    tensors = {p.name: (p.labels, _Sums.of(g.channels)) for g in groups for p in g.tensors}
    layers = {layer.name: layer for g in groups for layer, _ in g.layers}
    rows: dict[str, Float] = {}
    lost: set[str] = set()
    for part in plan.by_shape():
        backward = Backward.of(part)
        backward = backward.loaded(part.runtime)
        adjoints, sites = backward.reverse.adjoints, part.network.sites
        lost |= {t for t in tensors if sites[t] not in adjoints}
        lost |= {n for n, x in layers.items() if any(u.output not in adjoints for u in x.uses)}
        for done in backward.passes(exact=False):
            for name in tensors.keys() - lost:
                site = sites[name]
                labels, sums = tensors[name]
                sums.add(done.rows[0][site], done.rows[0][adjoints[site]], labels)
            for name in layers.keys() - lost:
                rows[name] = rows.get(name, 0.0) + _squares(layers[name], done.rows[0], adjoints, done.batch)
    usable = {n for n, (_, s) in tensors.items() if n not in lost and np.isfinite([s.squares, s.sensitivity]).all()}
    return Measures({n: tensors[n][1] for n in tensors if n in usable}, rows)


def _squares(layer: Layer, values: Mapping[str, Array], adjoints: Mapping[str, str], batch: int) -> Float:
    """Return Σ g² over samples and positions of each output channel, [units]."""
    total: Any = 0.0
    for use in layer.uses:
        g = use.linear.outputs(values[adjoints[use.output]], batch)
        each = np.square(g, dtype=np.float64).sum(axis=(0, 3))[..., None]
        total = total + use.linear.ungrouped(each).sum(axis=-1)
    return np.asarray(total)


@dataclass(frozen=True)
class Choice:
    """The best scales of a group. before, after: its δ without and with them, activations and weights."""

    group: ScaleGroup
    scales: Float
    before: tuple[float, float]
    after: tuple[float, float]

    @classmethod
    def of(cls, group: ScaleGroup, measures: Measures, network: Network, bits: tuple[float, float]) -> "Choice":
        """Try all powers. bits: of activations and weights."""
        model = _Model.of(group, measures, network, bits)
        tried = [(sum(model.loss(r)), k, r) for k, r in enumerate(model.scales())]
        _, _, best = min(tried, key=lambda each: each[:2])
        return cls(group, best, model.loss(np.ones(group.channels)), model.loss(best))


    def pays(self, total: float) -> bool:
        """Whether the scales gain enough. total: δ of all groups."""
        before, after = sum(self.before), sum(self.after)
        needed = _GAIN * before if not self.group.multiplied else max(_GAIN * before, _MUL * total)
        return before - after > needed

    def rewrite(self) -> ScaleChannels:
        """Return the pass that applies the scales."""
        group = self.group

        def factor(place: Place) -> Float:
            return np.append(self.scales, 1.0)[place.labels] ** place.power

        return ScaleChannels(
            {(p.name, p.index): factor(p) for p in group.constants},
            {p.name: factor(p) for p in group.multiplied},
            {(p.name, p.index): factor(p) for p in group.operands},
        )


@dataclass(frozen=True)
class _Model:
    """δ of a group as a function of r."""

    group: ScaleGroup
    measures: Measures
    rows: Sequence[tuple[Float, Labels, Float]]  # |W| [rows, weights], labels of the same shape, E[g²] [rows]
    bits: tuple[float, float]

    @classmethod
    def of(cls, group: ScaleGroup, measures: Measures, network: Network, bits: tuple[float, float]) -> "_Model":
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
