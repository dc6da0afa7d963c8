"""Sensitivity of the network's output to rounding errors: second moments of its gradient in a layer's weights.

To first order (supplement, Eq. 3), rounding errors ΔW_j of channel j, after bias correction, distort the output by

    δ = ΔW_jᵀ F_j ΔW_j / D,    F_j = E[∇_j ∇_jᵀ],    ∇_j = Σ_p g_jp (x_p - E[x])

which is the curve that will be measured, as a quadratic form. The sum over positions p is inside the square: errors
common to all positions add up, the others average out, and the covariance of single positions cannot distinguish the
two. The rank of F_j is at most the number of samples, so the channels of a layer share the sum F = Σ_j F_j, which
rounding mixes with the covariance (moments.py).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.candidates.blocks import in_parts
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.gradients.backward import Backward, Pass, declared_shapes, use_gradients
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.system.progress import Advance

Array = NDArray[Any]
Float = NDArray[np.float64]
Kind = type[np.floating[Any]]


def with_sensitivity(
    plan: ReversePlan, moments: Sequence[Moments], advance: Advance, kind: Kind = np.float64
) -> tuple[Moments, ...]:
    """Add F from one reverse pass to the `moments` of the layers of `plan.network`; `advance(n)` after n more samples.

    kind: the type that F is summed in.

    Layers with one position per sample stay without F, which adds little to the covariance there; so do layers whose
    outputs have no adjoint, or no finite one.
    """
    works = [_work(part, moments, kind) for part in plan.by_shape()]
    count, totals = plan.summed(works, advance, exact=False)
    found = {k: f / count for k, (samples, f) in totals.items() if samples == count}
    usable = {k for k, f in found.items() if np.isfinite(f).all()}
    return tuple(replace(m, sensitivity=found[k]) if k in usable else m for k, m in enumerate(moments))


Totals = tuple[int, dict[int, tuple[int, Array]]]  # samples, and by a layer's index its samples and F [G·parts, B, B]


@dataclass(frozen=True)
class _Work(ABC):
    """Sums of ∇ ∇ᵀ of the layers of a plan, of those with an index in `kept`."""

    backward: Backward
    kept: tuple[int, ...]
    centres: Mapping[int, "_Centre"]
    kind: Kind

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.backward.plan.network.layers

    @abstractmethod
    def loaded(self) -> Callable[[Block], Totals]: ...


@dataclass(frozen=True)
class _Centre:
    """What a layer's sum needs of its moments: the mean [G, K], and the shape of the covariance."""

    mean: Float
    shape: tuple[int, ...]


def _work(plan: ReversePlan, moments: Sequence[Moments], kind: Kind) -> _Work:
    backward = Backward.of(plan)
    shapes = declared_shapes(backward.reverse.model.graph.output)
    kept = tuple(
        k
        for k, layer in enumerate(plan.network.layers)
        if not backward.lost(layer) and (plan.total or _positions(layer, backward, shapes) > 1)
    )
    centres = {k: _Centre(moments[k].mean, moments[k].covariance.shape) for k in kept}
    work = _GraphWork if plan.runtime.in_graph else _HostWork
    return work(backward.travelling(), kept, centres, kind)


class _HostWork(_Work):
    """Sums in numpy, from the outputs of passes."""

    def loaded(self) -> Callable[[Block], Totals]:
        backward = self.backward.loaded(self.backward.plan.runtime)

        def run(block: Block) -> Totals:
            totals: dict[int, tuple[int, Array]] = {}

            def add(k: int, done: Pass) -> None:
                second = _second(self.layers[k], self.centres[k], done, backward)
                _add(totals, k, done.count, second, self.kind)

            for done in backward.passes(False, [block]):
                backward.plan.workers.map(partial(add, done=done), self.kept)
                del done  # or two passes would be in memory while the next one runs
            return len(block), totals

        return run


class _GraphWork(_Work):
    """Sums by nodes appended to the reverse graph."""

    def loaded(self) -> Callable[[Block], Totals]:
        backward, graph = self.backward, self.backward.sum_graph()
        for k in self.kept:
            parts, width, _ = self.centres[k].shape
            graph.sensitivity(self.layers[k], backward.reverse.adjoints, self.centres[k].mean, (parts, width))
        backward = backward.loaded(backward.plan.runtime, graph.model())

        def run(block: Block) -> Totals:
            totals: dict[int, tuple[int, Array]] = {}
            for count, rows in backward.sums(False, [block]):
                for k, second in zip(self.kept, next(rows), strict=True):
                    _add(totals, k, count, second, self.kind)
            return len(block), totals

        return run


def _add(totals: dict[int, tuple[int, Array]], index: int, samples: int, second: Array, kind: Kind) -> None:
    before, total = totals.get(index, (0, None))
    if total is None:
        total = second.astype(kind)
    else:
        total += second
    totals[index] = before + samples, total


def _positions(layer: Layer, backward: Backward, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return P of one use of `layer`; shapes: those of the reverse graph's outputs."""
    shape = shapes[backward.reverse.adjoints[layer.uses[0].output]]
    return layer.linear.positions(math.prod(shape) // backward.batch)


def _second(layer: Layer, centre: _Centre, done: Pass, backward: Backward) -> Float:
    """Return Σ ∇ ∇ᵀ over the samples of one batch and the channels, [G·parts, B, B]."""
    mean = centre.mean.astype(np.float32)[..., None]
    pairs = [use_gradients(use, done, backward.reverse.adjoints) for use in layer.uses]
    centred = [(x - mean, g) for x, g in pairs]
    _, _, channels, positions = pairs[0][1].shape
    total = np.zeros(centre.shape)
    for sample in range(done.count):
        uses = [(x[sample], g[sample]) for x, g in centred]
        if len(uses) == 1 and positions < channels:
            # Σ ∇ ∇ᵀ = X (gᵀ g) Xᵀ takes fewer operations.
            x, g = uses[0]
            parts = in_parts(x)
            inner = np.repeat(g.swapaxes(1, 2) @ g, len(parts) // len(g), axis=0)
            total += parts @ inner @ parts.swapaxes(1, 2)
        else:
            parts = in_parts(sum(x @ g.swapaxes(1, 2) for x, g in uses))
            total += parts @ parts.swapaxes(1, 2)
    return total
