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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    sums_of = _GraphSums if plan.runtime.in_graph else _HostSums
    totals: dict[int, Array] = {}
    lost: set[int] = set()
    count = 0
    for part in plan.by_shape():
        sums = sums_of(part, moments, Backward.of(part), kind)
        for number in sums.batches():
            count += number
            advance(number)
        totals = {k: totals[k] + f if k in totals else f for k, f in sums.totals.items()}
        lost |= set(range(len(moments))) - totals.keys()
        del sums  # and its session
    for f in totals.values():
        f /= count
    usable = {k for k, f in totals.items() if np.isfinite(f).all()} - lost
    return tuple(replace(m, sensitivity=totals[k]) if k in usable else m for k, m in enumerate(moments))


class _Sums(ABC):
    """Running sums of ∇ ∇ᵀ. totals: [G·parts, B, B] by the layer's index."""

    def __init__(self, plan: ReversePlan, moments: Sequence[Moments], backward: Backward, kind: Kind) -> None:
        layers = plan.network.layers
        self._plan, self._layers, self._moments, self._backward = plan, layers, moments, backward
        self._kind = kind
        shapes = declared_shapes(backward.reverse.model.graph.output)
        self._kept = [
            k
            for k, layer in enumerate(layers)
            if not backward.lost(layer) and (plan.total or _positions(layer, backward, shapes) > 1)
        ]
        self.totals: dict[int, Array] = {}

    @abstractmethod
    def batches(self) -> Iterator[int]:
        """Add all samples; yield the number of samples of each batch."""

    def _add(self, index: int, second: NDArray[Any]) -> None:
        if index in self.totals:
            self.totals[index] += second
        else:
            self.totals[index] = second.astype(self._kind)


class _HostSums(_Sums):
    """Sums in numpy, from the outputs of passes."""

    def __init__(self, plan: ReversePlan, moments: Sequence[Moments], backward: Backward, kind: Kind) -> None:
        super().__init__(plan, moments, backward.loaded(plan.runtime), kind)

    def batches(self) -> Iterator[int]:
        for done in self._backward.passes(exact=False):
            self._plan.workers.map(lambda k, done=done: self._add_layer(k, done), self._kept)  # type: ignore[misc]
            yield done.count
            del done  # or two passes would be in memory while the next one runs

    def _add_layer(self, index: int, done: Pass) -> None:
        self._add(index, _second(self._layers[index], self._moments[index], done, self._backward))


class _GraphSums(_Sums):
    """Sums by nodes appended to the reverse graph."""

    def __init__(self, plan: ReversePlan, moments: Sequence[Moments], backward: Backward, kind: Kind) -> None:
        super().__init__(plan, moments, backward, kind)
        graph = backward.sum_graph()
        for k in self._kept:
            mean, (parts, width, _) = moments[k].mean, moments[k].covariance.shape
            graph.sensitivity(self._layers[k], backward.reverse.adjoints, mean, (parts, width))
        self._backward = backward.loaded(plan.runtime, graph.model())

    def batches(self) -> Iterator[int]:
        for count, rows in self._backward.sums(exact=False):
            for k, second in zip(self._kept, next(rows), strict=True):
                self._add(k, second)
            yield count


def _positions(layer: Layer, backward: Backward, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return P of one use of `layer`; shapes: those of the reverse graph's outputs."""
    shape = shapes[backward.reverse.adjoints[layer.uses[0].output]]
    return layer.linear.positions(math.prod(shape) // backward.batch)


def _second(layer: Layer, moments: Moments, done: Pass, backward: Backward) -> Float:
    """Return Σ ∇ ∇ᵀ over the samples of one batch and the channels, [G·parts, B, B]."""
    mean = moments.mean.astype(np.float32)[..., None]
    pairs = [use_gradients(use, done, backward.reverse.adjoints) for use in layer.uses]
    centred = [(x - mean, g) for x, g in pairs]
    _, _, channels, positions = pairs[0][1].shape
    total = np.zeros(moments.covariance.shape)
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
