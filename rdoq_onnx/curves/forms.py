"""Curves of a large layer as quadratic forms: sums over samples once, then any ΔW at the cost of one product.

δ_j = E⟨∇_j, ΔW_j⟩² / D is a form in ΔW_j whose matrix E[∇_j ∇_jᵀ] is too large to keep for each channel j. In an
orthonormal basis U in which the matrices of all channels are nearly diagonal, their diagonals suffice (EKFAC, George
et al., NeurIPS 2018):

    δ_j ≈ Σ_k p_jk (Uᵀ ΔW_j)_k² / D,    p_jk = E[(Uᵀ ∇_j)_k²]

U holds the eigenvectors of F = E[Σ_j ∇_j ∇_jᵀ] from other samples: those that the rounding was fitted to. Beyond
MOST_WEIGHTS weights even p is too large, and only its sums over j and over k are kept: p_jk ≈ p_j p_k / Σ p.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.candidates.blocks import Blocks, in_parts
from rdoq_onnx.candidates.statistics import Statistics, portion_name
from rdoq_onnx.gradients.backward import Backward, Pass, use_gradients
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.summation import every

Array = NDArray[Any]

MOST_WEIGHTS = 1 << 28


@dataclass(frozen=True)
class Form:
    """The forms of a layer's channels, E[⟨∇, ΔW⟩²] of channel j.

    basis [G·parts, B, B]; powers [G·parts, O, B], or [G·parts, O, 1] and `shares` [G·parts, 1, B] whose product it is.
    """

    blocks: Blocks
    basis: Array
    powers: Array
    shares: Array | None = None

    def __call__(self, changes: Array, units: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the forms of `changes` [units, weights of a unit], of the channels `units`."""
        turned = self.blocks.cut(changes) @ self.basis
        np.square(turned, out=turned)
        powers = self.powers[:, units] if self.blocks.single else self.powers
        if self.shares is None:
            sums = np.einsum("gok,gok->go", turned, powers)
        else:
            sums = (turned @ self.shares.swapaxes(1, 2) * powers)[..., 0]
        return self.blocks.gather(sums.astype(np.float64), 1)[:, 0]


@dataclass(frozen=True)
class Forms:
    """The sum of several forms of the same channels."""

    parts: tuple[Form, ...]

    def __call__(self, changes: Array, units: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the forms of `changes`, as a `Form` does."""
        return np.asarray(sum(form(changes, units) for form in self.parts))


@dataclass(frozen=True)
class _Centred:
    """What the sums of p of a layer need: E[x] [G, K, 1] and the basis."""

    layer: Layer
    mean: Array
    basis: Array

    @classmethod
    def of(cls, layer: Layer, statistics: Statistics) -> "_Centred":
        mean = statistics.moments(layer).mean.astype(np.float32)[..., None]
        return cls(layer, mean, statistics.basis(layer))

    def squares(self, done: Pass, backward: Backward) -> Iterator[Array]:
        """Yield (Uᵀ ∇)² of each sample of a pass, [G·parts, rows·O, B]."""
        turned = self.basis.swapaxes(1, 2)
        pairs = [use_gradients(use, done, backward.reverse.adjoints) for use in self.layer.uses]
        repeat = len(self.basis) // self.layer.linear.group
        for sample in range(done.count):
            gradient: Any = 0.0
            for x, g in pairs:
                inputs = turned @ in_parts(x[sample] - self.mean)
                gradient = gradient + np.repeat(g[sample], repeat, axis=0) @ inputs.swapaxes(1, 2)
            yield np.square(gradient)


class FormSums:
    """Running sums of p of one layer, in float32."""

    def __init__(self, centred: _Centred, marginal: bool) -> None:
        self._centred, self._marginal = centred, marginal
        linear = centred.layer.linear
        blocks, outputs = Blocks(linear), linear.channels
        count, width = linear.group * blocks.parts, in_parts(centred.mean).shape[1]
        outputs = outputs if blocks.shared else outputs // linear.group
        self.powers = np.zeros((count, outputs, 1 if marginal else width), np.float32)
        self.shares = np.zeros((count, 1, width), np.float32)

    def add(self, done: Pass, backward: Backward) -> None:
        """Add the samples of one pass."""
        count, outputs, _ = self.powers.shape
        for squares in self._centred.squares(done, backward):
            summed = squares.reshape(count, -1, outputs, squares.shape[-1]).sum(axis=1)
            if self._marginal:
                self.shares += summed.sum(axis=1, keepdims=True)
                summed = summed.sum(axis=2, keepdims=True)
            self.powers += summed


def marginal(network: Network) -> bool:
    """Whether only the sums of p are kept."""
    return sum(math.prod(layer.linear.shape) for layer in network.layers) > MOST_WEIGHTS


def kept_form(statistics: Statistics, layer: Layer) -> Form:
    """Return the forms that `measure_forms` kept of a layer."""
    shares = statistics.get("shares", layer) if statistics.has("shares", layer) else None
    return Form(Blocks(layer.linear), statistics.basis(layer), statistics.get("powers", layer), shares)


def measure_forms(plan: ReversePlan, statistics: Statistics, advance: Advance) -> dict[str, str]:
    """Sum p of each layer of `plan.network` over its samples, in portions that fit in memory, and keep it.

    Returns the outputs of layers without an adjoint, with the reason.
    """

    def of_portion(layers: list[Layer]) -> dict[str, str]:
        missing = tuple(x for x in layers if not statistics.has("powers", x))
        if not missing:
            advance(len(plan.samples))
            return {}
        network, name = replace(plan.network, layers=missing), portion_name(plan.name, layers, missing)
        return _measure(replace(plan, network=network, name=name), statistics, advance)

    found = every(partial(of_portion, layers) for layers in form_portions(plan.network, statistics.memory))
    return {output: reason for lost in found for output, reason in lost.items()}


def _measure(plan: ReversePlan, statistics: Statistics, advance: Advance) -> dict[str, str]:
    few = marginal(statistics.network)
    centred = tuple(_Centred.of(layer, statistics) for layer in plan.network.layers)
    works = [_Work(Backward.of(part).travelling(), centred, few) for part in plan.by_shape()]
    runs, sums, reason = plan.summed(works, advance, exact=True)
    lost = {u.output: reason[u.output] for x in plan.network.layers for u in x.uses if u.output in reason}
    factor = np.float32(1 / (max(runs, 1) * plan.metric.elements))
    for layer, (powers, shares) in zip(plan.network.layers, sums, strict=True):
        if any(u.output in lost for u in layer.uses):
            continue
        statistics.put("powers", layer, powers * factor)
        if few:
            total = np.maximum(shares.sum(axis=2, keepdims=True), np.finfo(np.float32).tiny)
            statistics.put("shares", layer, shares / total)
    return lost


@dataclass(frozen=True)
class _Work:
    """Sums of p of all layers: (samples, of each layer p and its sums over channels, tensors without an adjoint)."""

    backward: Backward
    layers: tuple[_Centred, ...]
    marginal: bool

    def loaded(self) -> Callable[[Block], tuple[Any, ...]]:
        plan = self.backward.plan
        backward = self.backward.loaded(plan.runtime)

        def run(block: Block) -> tuple[Any, ...]:
            sums = [FormSums(each, self.marginal) for each in self.layers]
            usable = [s for s, each in zip(sums, self.layers, strict=True) if not backward.lost(each.layer)]
            runs = 0
            for done in backward.passes(True, [block]) if usable else ():
                plan.workers.map(lambda each, done=done: each.add(done, backward), usable)  # type: ignore[misc]
                runs += done.count
                del done  # or two passes would be in memory while the next one runs
            return runs, tuple((s.powers, s.shares) for s in sums), dict(backward.reverse.missing)

        return run


def form_portions(network: Network, memory: int) -> list[list[Layer]]:
    """Divide the layers so that the sums of one pass take at most `memory` bytes."""
    portions: list[list[Layer]] = [[]]
    total = 0
    for layer in network.layers:
        size = 0 if marginal(network) else 4 * math.prod(layer.linear.shape)
        if portions[-1] and total + size > memory:
            portions.append([])
            total = 0
        portions[-1].append(layer)
        total += size
    return portions
