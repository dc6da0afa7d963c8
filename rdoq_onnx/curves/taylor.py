"""First-order curves (supplement, Eq. 3 to 6): δ = E‖J Δ‖² / D with J = ∂F̃/∂s at s = 0.

For a random sign vector v over the outputs, independent for each sample, E_v[(vᵀ J Δ)²] = ‖J Δ‖². One reverse pass
gives g = Jᵀ v at all Adds of F̃; each channel, activation and width then costs one inner product ⟨g, Δ⟩. For few outputs
v runs over the unit vectors instead, and the estimate is exact to first order.

For a weight channel ⟨g, op(x, ΔW)⟩ = ⟨g Xᵀ, ΔW⟩ (see model/linear.py): one product g Xᵀ serves all widths. The bias is
corrected by -ΔW·E[x], which leaves a perturbation ΔW(x - E[x]) and the product g (X - E[x])ᵀ.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.curves.quantizer_sums import rounding_sums
from rdoq_onnx.gradients.backward import Backward, Pass, weight_gradients
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.system.progress import Advance, Unfinished

Array = NDArray[Any]


def first_order(
    plan: ReversePlan, candidates: Candidates, advance: Advance, unfinished: Unfinished | None = None
) -> Distortions:
    """Measure the curves of all `candidates`, those of `plan.network`; `advance(n)` after n more samples.

    unfinished: sums of an earlier run, which continues from there.
    """
    of = _GraphWork if plan.runtime.in_graph else _HostWork
    works = [of(Backward.of(part).travelling(), candidates) for part in plan.by_shape()]
    samples, weights, activations, missing = plan.summed(works, advance, True, unfinished)
    factor = 1.0 / (max(samples, 1) * plan.metric.elements)

    def scale(tensors: Iterable[str]) -> float:
        return factor if missing.keys().isdisjoint(tensors) else np.nan

    weights = tuple(
        total * scale(u.output for u in each.layer.uses) for each, total in zip(candidates.layers, weights, strict=True)
    )
    tables = zip(candidates.activations, activations, strict=True)
    return Distortions(
        weights,
        tuple({b: v * scale([a.activation.tensor]) for b, v in _by_width(a, sums).items()} for a, sums in tables),
        missing,
    )


def _by_width(candidates: ActivationCandidates, sums: Array) -> dict[int, Array]:
    """Divide `sums`, one for each quantizer, by width."""
    ends = np.cumsum([len(quantizers) for quantizers in candidates.table.values()])
    return dict(zip(candidates.table, np.split(sums, ends[:-1]), strict=True))


Totals = tuple[int, tuple[Array, ...], tuple[Array, ...], dict[str, str]]


@dataclass(frozen=True)
class _Work(ABC):
    """Sums of ⟨g, Δ⟩² over samples.

    They are the number of samples, [variants, units, widths] of each layer, [quantizers] of each activation, and the
    tensors without an adjoint, with the reason.
    """

    backward: Backward
    candidates: Candidates

    @abstractmethod
    def loaded(self) -> Callable[[Block], Totals]: ...


class _Sums:
    """What both works share: the sums of each layer, with its ΔW, and of each activation with an adjoint."""

    def __init__(self, backward: Backward, candidates: Candidates) -> None:
        network, lost = backward.plan.network, backward.reverse.missing
        self.backward, self.candidates = backward, candidates
        sites = {**{u.output: u.output for layer in network.layers for u in layer.uses}, **network.sites}
        self.missing = {tensor: lost[site] for tensor, site in sites.items() if site in lost}
        self.all = [_LayerSums(each, network.rows(each.layer)) for each in candidates.layers]
        self.layers = [sums for sums in self.all if not backward.lost(sums.layer)]
        self.differentiable = [k for k, a in enumerate(network.activations) if a.tensor not in self.missing]
        self.begin()

    def begin(self) -> None:
        """Begin a block."""
        self.samples = 0
        self.activations = [np.zeros(len(each.flat)) for each in self.candidates.activations]
        for sums in self.all:
            sums.begin()

    def totals(self) -> Totals:
        return self.samples, tuple(s.total for s in self.all), tuple(self.activations), self.missing


class _HostWork(_Work):
    """Sums in numpy, from the outputs of passes."""

    def loaded(self) -> Callable[[Block], Totals]:
        plan = self.backward.plan
        backward = self.backward.loaded(plan.runtime)
        sums, adjoints = _Sums(backward, self.candidates), backward.reverse.adjoints

        def run(block: Block) -> Totals:
            sums.begin()
            for done in backward.passes(True, [block]):
                plan.workers.map(lambda each, done=done: each.add(each.products(done, adjoints)), sums.layers)  # type: ignore[misc]
                found = plan.workers.map(lambda k, done=done: self._rounding(k, done, adjoints), sums.differentiable)  # type: ignore[misc]
                for k, squares in zip(sums.differentiable, found, strict=True):
                    sums.activations[k] += squares
                sums.samples += done.count
                del done  # or two passes would be in memory while the next one runs
            return sums.totals()

        return run

    def _rounding(self, index: int, done: Pass, adjoints: Mapping[str, str]) -> NDArray[np.float64]:
        """Return Σ ⟨g, Q(a) - a⟩² for each quantizer of an activation."""
        network = self.backward.plan.network
        tensor = network.sites[network.activations[index].tensor]
        values = done.rows[0][tensor].reshape(done.batch, -1)[: done.count]
        g = np.stack([row[adjoints[tensor]].reshape(done.batch, -1)[: done.count] for row in done.rows], axis=1)
        return rounding_sums(values, g, self.candidates.activations[index].flat)


class _GraphWork(_Work):
    """Sums by nodes appended to the reverse graph: feeds and seeds go to the device, sums come back.

    Each v takes a run of its own, which repeats the forward pass.
    """

    def loaded(self) -> Callable[[Block], Totals]:
        plan = self.backward.plan
        model, names = _sum_graph(plan.network, self.candidates, self.backward)
        backward = self.backward.loaded(plan.runtime, model)
        sums = _Sums(backward, self.candidates)
        changes = {name: plan.runtime.tensor(s.changes) for name, s in zip(names, sums.layers, strict=False)}

        def run(block: Block) -> Totals:
            sums.begin()
            for count, rows in backward.sums(True, [block], changes):
                for outputs in rows:
                    for each, squares in zip(sums.layers, outputs, strict=False):
                        each.add(squares[:, 0])
                    for k, squares in zip(sums.differentiable, outputs[len(sums.layers) :], strict=True):
                        sums.activations[k] += squares.reshape(-1)
                sums.samples += count
            return sums.totals()

        return run


def _sum_graph(network: Network, candidates: Candidates, backward: Backward) -> tuple[onnx.ModelProto, list[str]]:
    """Return the reverse graph with all sums, and the inputs for each layer's ΔW."""
    reverse, graph = backward.reverse, backward.sum_graph()
    changes = [
        graph.curve(x.layer, reverse.adjoints, x.mean, len(x.variants) * len(x.variants[0]))
        for x in candidates.layers
        if not backward.lost(x.layer)
    ]
    for each in candidates.activations:
        site = network.sites[each.activation.tensor]
        if site not in reverse.missing:
            graph.rounding(site, reverse.adjoints[site], each.flat)
    return graph.model(), changes


class _LayerSums:
    """Sums over samples and rows of ⟨g, Δz⟩² for one layer, [variants, units, widths].

    changes: ΔW of each unit, [units, weights of a unit, variants·widths].
    """

    def __init__(self, candidates: LayerCandidates, rows: NDArray[np.float32]) -> None:
        layer, variants = candidates.layer, candidates.variants
        self.layer, self.mean = layer, candidates.mean.astype(np.float32)
        deltas = [code.change(rows) for variant in variants for code in variant]
        self.changes = np.ascontiguousarray(np.stack(deltas, axis=-1).astype(np.float32))
        self._shape = len(variants), layer.linear.channels, len(variants[0])
        self.begin()

    def begin(self) -> None:
        self.total = np.zeros(self._shape)

    def products(self, done: Pass, adjoints: Mapping[str, str]) -> NDArray[np.float64]:
        """Return Σ ⟨g Xᵀ, ΔW⟩² over the samples of a batch, [units, variants·widths]."""
        linear = self.layer.linear
        gradient = weight_gradients(self.layer, self.mean[:, None, :], done, adjoints)
        blocks = gradient.reshape(done.count, linear.group, len(done.rows), -1, gradient.shape[-1])
        per_unit = linear.ungrouped(np.moveaxis(blocks, 2, 1)).reshape(-1, linear.channels, self.changes.shape[1])
        products = per_unit.swapaxes(0, 1) @ self.changes
        sums: NDArray[np.float64] = np.square(products, dtype=np.float64).sum(axis=1)
        return sums

    def add(self, sums: NDArray[Any]) -> None:
        """Add `sums` [units, variants·widths]."""
        self.total += np.moveaxis(sums.reshape(self._shape[1], self._shape[0], self._shape[2]), 1, 0)
