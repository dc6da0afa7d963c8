"""First-order curves (supplement, Eq. 3 to 6): δ = E‖J Δ‖² / D with J = ∂F̃/∂s at s = 0.

For a random sign vector v over the outputs, independent for each sample, E_v[(vᵀ J Δ)²] = ‖J Δ‖². One reverse pass
gives g = Jᵀ v at all Adds of F̃; each channel, activation and width then costs one inner product ⟨g, Δ⟩. For few outputs
v runs over the unit vectors instead, and the estimate is exact to first order.

For a weight channel ⟨g, op(x, ΔW)⟩ = ⟨g Xᵀ, ΔW⟩ (see model/linear.py): one product g Xᵀ serves all widths. The bias is
corrected by -ΔW·E[x], which leaves a perturbation ΔW(x - E[x]) and the product g (X - E[x])ᵀ.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates
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
    unfinished = unfinished or Unfinished()
    kind = _GraphSums if plan.runtime.in_graph else _HostSums
    state, missing = unfinished.get(), dict[str, str]()
    if state is not None:
        advance(state["samples"])
    for part in plan.by_shape():
        sums = kind(part, candidates, Backward.of(part))
        sums.restore(state)
        for count in sums.batches():
            unfinished.put(sums.state())
            advance(count)
        state, missing = sums.state(), sums.missing | missing
    return sums.result(missing)


class _Sums(ABC):
    """Running sums of ⟨g, Δ⟩² over samples."""

    def __init__(self, plan: ReversePlan, candidates: Candidates, backward: Backward) -> None:
        network = plan.network
        self._plan, self._candidates, self._backward = plan, candidates, backward
        self._reverse = backward.reverse
        lost = backward.reverse.missing
        sites = {**{u.output: u.output for layer in network.layers for u in layer.uses}, **network.sites}
        self.missing = {tensor: lost[site] for tensor, site in sites.items() if site in lost}
        self.samples = 0
        self._all = [_LayerSums(each, network.rows(each.layer)) for each in candidates.layers]
        self._layers = [sums for sums in self._all if not backward.lost(sums.layer)]
        self._activations = [{b: np.zeros(len(q)) for b, q in a.table.items()} for a in candidates.activations]
        self._differentiable = [k for k, a in enumerate(network.activations) if a.tensor not in self.missing]

    @abstractmethod
    def batches(self) -> Iterator[int]:
        """Add the remaining samples; yield the number of samples of each batch."""

    def state(self) -> dict[str, Any]:
        """Return the sums so far, for `restore`."""
        activations = tuple({b: v.copy() for b, v in table.items()} for table in self._activations)
        layers = tuple(s.total.copy() for s in self._all)
        return {"samples": self.samples, "layers": layers, "activations": activations}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from `state`, if there is one."""
        if state is not None:
            self.samples, self._activations = state["samples"], [dict(table) for table in state["activations"]]
            for sums, total in zip(self._all, state["layers"], strict=True):
                sums.total = total.copy()

    def _add_activation(self, index: int, sums: NDArray[Any]) -> None:
        """Add `sums`, one for each quantizer, width by width."""
        table = self._activations[index]
        parts = np.split(sums, np.cumsum([len(total) for total in table.values()])[:-1])
        for bits, part in zip(table, parts, strict=True):
            table[bits] += part

    def result(self, missing: Mapping[str, str]) -> Distortions:
        """Return the curves: the sums over the number of samples and output elements; NaN for what is `missing`."""
        factor = 1.0 / (max(self.samples, 1) * self._plan.metric.elements)

        def scale(tensors: Iterable[str]) -> float:
            return factor if missing.keys().isdisjoint(tensors) else np.nan

        weights = tuple(s.total * scale(u.output for u in s.layer.uses) for s in self._all)
        activations = tuple(
            {b: v * scale([a.activation.tensor]) for b, v in sums.items()}
            for a, sums in zip(self._candidates.activations, self._activations, strict=True)
        )
        return Distortions(weights, activations, missing)


class _HostSums(_Sums):
    """Sums in numpy, from the outputs of passes."""

    def __init__(self, plan: ReversePlan, candidates: Candidates, backward: Backward) -> None:
        super().__init__(plan, candidates, backward.loaded(plan.runtime))

    def batches(self) -> Iterator[int]:
        adjoints, workers = self._reverse.adjoints, self._plan.workers
        for done in self._backward.passes(first=self.samples):
            workers.map(lambda sums, done=done: sums.add(sums.products(done, adjoints)), self._layers)  # type: ignore[misc]
            workers.map(lambda k, done=done: self._add_activation(k, self._rounding(k, done)), self._differentiable)  # type: ignore[misc]
            self.samples += done.count
            yield done.count
            del done  # or two passes would be in memory while the next one runs

    def _rounding(self, index: int, done: Pass) -> NDArray[np.float64]:
        """Return Σ ⟨g, Q(a) - a⟩² for each quantizer of an activation."""
        network = self._plan.network
        tensor = network.sites[network.activations[index].tensor]
        values = done.rows[0][tensor].reshape(done.batch, -1)[: done.count]
        name = self._reverse.adjoints[tensor]
        g = np.stack([row[name].reshape(done.batch, -1)[: done.count] for row in done.rows], axis=1)
        return rounding_sums(values, g, self._candidates.activations[index].flat)


class _GraphSums(_Sums):
    """Sums by nodes appended to the reverse graph: feeds and seeds go to the device, sums come back.

    Each v takes a run of its own, which repeats the forward pass.
    """

    def __init__(self, plan: ReversePlan, candidates: Candidates, backward: Backward) -> None:
        model, changes = _sum_graph(plan.network, candidates, backward)
        super().__init__(plan, candidates, backward.loaded(plan.runtime, model))
        self._changes = {name: plan.runtime.tensor(s.changes) for name, s in zip(changes, self._layers, strict=False)}

    def batches(self) -> Iterator[int]:
        for count, rows in self._backward.sums(first=self.samples, fixed=self._changes):
            for outputs in rows:
                for sums, squares in zip(self._layers, outputs, strict=False):
                    sums.add(squares[:, 0])
                for k, squares in zip(self._differentiable, outputs[len(self._layers) :], strict=True):
                    self._add_activation(k, squares.reshape(-1))
            self.samples += count
            yield count


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
