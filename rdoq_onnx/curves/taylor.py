"""First-order curves (supplement, Eq. 3 to 6): δ = E‖J Δ‖² / D with J = ∂F̃/∂s at s = 0.

For a random sign vector v over the outputs, independent for each sample, E_v[(vᵀ J Δ)²] = ‖J Δ‖². One reverse pass
gives g = Jᵀ v at every Add of F̃ at once; each channel, activation and width then costs one inner product ⟨g, Δ⟩. For
few outputs v runs over the unit vectors instead, and the estimate is exact to first order.

For a weight channel ⟨g, op(x, ΔW)⟩ = ⟨g Xᵀ, ΔW⟩ (see linear.py): the product g Xᵀ is made once for all widths. The bias
is corrected by -ΔW·E[x], so what is left of the perturbation is ΔW(x - E[x]) and the product is g (X - E[x])ᵀ.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.candidates import Candidates
from rdoq_onnx.curves.quantizer_sums import rounding_sums
from rdoq_onnx.gradients.backward import Backward, Pass, weight_gradients
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers

Array = NDArray[Any]


def first_order(
    network: Network,
    candidates: Candidates,
    samples: Samples,
    metric: Metric,
    runtime: Runtime,
    *,
    batch: int,
    seed: int,
    workers: Workers,
    advance: Advance,
    around: onnx.ModelProto | None = None,
    unfinished: Unfinished | None = None,
) -> Distortions:
    """Measure all curves of `network` over `samples`, `batch` of them at a time; `advance(n)` is told of n done.

    around: the model whose Jacobian is taken, with the tensors of `network.model`, which it is by default. unfinished:
        sums of an earlier run, which goes on from there.
    """
    backward, unfinished = Backward.of(network, samples, metric, runtime, batch, around), unfinished or Unfinished()
    sums = (_GraphSums if runtime.in_graph else _HostSums)(network, candidates, backward, runtime)
    sums.restore(unfinished.get())
    if sums.samples:
        advance(sums.samples)
    for count in sums.batches(samples, seed, workers):
        unfinished.put(sums.state())
        advance(count)
    return sums.result(metric.elements)


class _Sums(ABC):
    """Running sums of ⟨g, Δ⟩² over samples."""

    def __init__(self, network: Network, candidates: Candidates, backward: Backward) -> None:
        self._network, self._candidates, self._backward = network, candidates, backward
        self._reverse = backward.reverse
        lost = backward.reverse.missing
        sites = {**{u.output: u.output for layer in network.layers for u in layer.uses}, **network.sites}
        self._missing = {tensor: lost[site] for tensor, site in sites.items() if site in lost}
        self.samples = 0
        self._layers = [
            _LayerSums(layer, network.rows(layer), codes, mean)
            for layer, codes, mean in zip(network.layers, candidates.weights, candidates.means, strict=True)
            if not backward.lost(layer)
        ]
        self._activations = [{b: np.zeros(len(q)) for b, q in table.items()} for table in candidates.activations]
        self._known = [k for k, a in enumerate(network.activations) if a.tensor not in self._missing]

    @abstractmethod
    def batches(self, samples: Samples, seed: int, workers: Workers) -> Iterator[int]:
        """Add the samples that are not there yet; gives the number of those in each batch."""

    def state(self) -> dict[str, Any]:
        """The sums so far, for `restore`."""
        activations = tuple({b: v.copy() for b, v in table.items()} for table in self._activations)
        layers = tuple(s.total.copy() for s in self._layers)
        return {"samples": self.samples, "layers": layers, "activations": activations}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.samples, self._activations = state["samples"], [dict(table) for table in state["activations"]]
            for sums, total in zip(self._layers, state["layers"], strict=True):
                sums.total = total

    def _add_activation(self, index: int, sums: NDArray[Any]) -> None:
        """sums: one for each quantizer, width by width."""
        table = self._activations[index]
        parts = np.split(sums, np.cumsum([len(total) for total in table.values()])[:-1])
        for bits, part in zip(table, parts, strict=True):
            table[bits] += part

    def result(self, elements: int) -> Distortions:
        share = 1.0 / (max(self.samples, 1) * elements)
        measured = {id(sums.layer): sums.total * share for sums in self._layers}
        weights = tuple(
            measured.get(id(layer), np.full((len(codes), layer.linear.channels, len(codes[0])), np.nan))
            for layer, codes in zip(self._network.layers, self._candidates.weights, strict=True)
        )
        activations = tuple(
            {b: v * (np.nan if a.tensor in self._missing else share) for b, v in sums.items()}
            for a, sums in zip(self._network.activations, self._activations, strict=True)
        )
        return Distortions(weights, activations, self._missing)


class _HostSums(_Sums):
    """By numpy, from what a pass has brought to the host."""

    def __init__(self, network: Network, candidates: Candidates, backward: Backward, runtime: Runtime) -> None:
        super().__init__(network, candidates, backward.loaded(runtime))

    def batches(self, samples: Samples, seed: int, workers: Workers) -> Iterator[int]:
        adjoints = self._reverse.adjoints
        for done in self._backward.passes(samples, seed, first=self.samples):
            workers.map(lambda sums, done=done: sums.add(sums.products(done, adjoints)), self._layers)  # type: ignore[misc]
            workers.map(lambda k, done=done: self._add_activation(k, self._rounding(k, done)), self._known)  # type: ignore[misc]
            self.samples += done.count
            yield done.count
            del done  # or two passes would be in memory while the next one runs

    def _rounding(self, index: int, done: Pass) -> NDArray[np.float64]:
        """Σ ⟨g, Q(a) - a⟩² for each quantizer of an activation."""
        tensor = self._network.sites[self._network.activations[index].tensor]
        values = done.rows[0][tensor].reshape(done.batch, -1)[: done.count]
        name = self._reverse.adjoints[tensor]
        g = np.stack([row[name].reshape(done.batch, -1)[: done.count] for row in done.rows], axis=1)
        return rounding_sums(values, g, _flat(self._candidates.activations[index]))


class _GraphSums(_Sums):
    """By nodes behind the reverse graph: feeds and seeds go to the device, sums come back.

    Several v take a run each, which makes the tensors of the forward pass anew.
    """

    def __init__(self, network: Network, candidates: Candidates, backward: Backward, runtime: Runtime) -> None:
        model, changes = _sum_graph(network, candidates, backward)
        super().__init__(network, candidates, backward.loaded(runtime, model))
        self._changes = {name: runtime.tensor(s.changes) for name, s in zip(changes, self._layers, strict=False)}

    def batches(self, samples: Samples, seed: int, workers: Workers) -> Iterator[int]:
        for count, rows in self._backward.sums(samples, seed, first=self.samples, fixed=self._changes):
            for found in rows:
                for sums, squares in zip(self._layers, found, strict=False):
                    sums.add(squares[:, 0])
                for k, squares in zip(self._known, found[len(self._layers) :], strict=True):
                    self._add_activation(k, squares.reshape(-1))
            self.samples += count
            yield count


def _sum_graph(network: Network, candidates: Candidates, backward: Backward) -> tuple[onnx.ModelProto, list[str]]:
    """The reverse graph with all sums, and the inputs that take each layer's ΔW."""
    reverse, graph = backward.reverse, backward.sum_graph()
    changes = [
        graph.curve(layer, reverse.adjoints, mean, len(codes) * len(codes[0]))
        for layer, codes, mean in zip(network.layers, candidates.weights, candidates.means, strict=True)
        if not backward.lost(layer)
    ]
    for activation, table in zip(network.activations, candidates.activations, strict=True):
        site = network.sites[activation.tensor]
        if site not in reverse.missing:
            graph.rounding(site, reverse.adjoints[site], _flat(table))
    return graph.model(), changes


def _flat(table: Mapping[int, Sequence[Affine]]) -> list[Affine]:
    return [q for several in table.values() for q in several]


class _LayerSums:
    """Sums over samples and rows of ⟨g, Δz⟩² for one layer, [variants, units, widths].

    changes: ΔW of each unit, [units, weights of a unit, variants·widths].
    """

    def __init__(
        self, layer: Layer, rows: NDArray[np.float32], codes: Sequence[Sequence[WeightCodes]], mean: NDArray[np.float64]
    ) -> None:
        self.layer, self.mean = layer, mean.astype(np.float32)
        deltas = [code.values - rows for variant in codes for code in variant]
        self.changes = np.ascontiguousarray(np.stack(deltas, axis=-1).astype(np.float32))
        self._shape = len(codes), layer.linear.channels, len(codes[0])
        self.total = np.zeros(self._shape)

    def products(self, done: Pass, adjoints: Mapping[str, str]) -> NDArray[np.float64]:
        """Σ ⟨g Xᵀ, ΔW⟩² over the samples of a batch, [units, variants·widths]."""
        linear = self.layer.linear
        gradient = weight_gradients(self.layer, self.mean[:, None, :], done, adjoints)
        blocks = gradient.reshape(done.count, linear.group, len(done.rows), -1, gradient.shape[-1])
        per_unit = linear.ungrouped(np.moveaxis(blocks, 2, 1)).reshape(-1, linear.channels, self.changes.shape[1])
        products = per_unit.swapaxes(0, 1) @ self.changes
        sums: NDArray[np.float64] = np.square(products, dtype=np.float64).sum(axis=1)
        return sums

    def add(self, sums: NDArray[Any]) -> None:
        """sums: [units, variants·widths]."""
        self.total += np.moveaxis(sums.reshape(self._shape[1], self._shape[0], self._shape[2]), 1, 0)
