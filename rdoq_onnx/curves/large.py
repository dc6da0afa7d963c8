"""Measure the weights of a large network: statistics, then layer by layer, coarse to fine.

The per-sample products of taylor.py need all candidates of all layers at once, about 140 bytes a weight. From
LARGE weights on, curves are quadratic forms (forms.py) instead, and one layer's candidates are in memory at a time.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates, widest
from rdoq_onnx.candidates.moment_passes import portions
from rdoq_onnx.candidates.scale_floors import scale_floors
from rdoq_onnx.candidates.statistics import Statistics
from rdoq_onnx.config import Config
from rdoq_onnx.curves.forms import form_portions, measure_forms
from rdoq_onnx.curves.layerwise import Layerwise
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.curves.missing_forms import lacks_gain
from rdoq_onnx.curves.select import Layers
from rdoq_onnx.curves.steps import SENSING, Bench
from rdoq_onnx.errors import ModelError
from rdoq_onnx.gradients.batch_sizes import forward_batch, reverse_batch, with_memory
from rdoq_onnx.gradients.plan import LEAST_DRAWS
from rdoq_onnx.model.external import detached_bytes
from rdoq_onnx.system.memory import memory_bound
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.threads import Alone

Float = NDArray[np.float64]
Around = Callable[[Measurement], NDArray[np.int64]]

LARGE = 4_000_000  # weights
REACH = 2  # bits around the first allocation that are rounded with compensation; within 1, up to 1.1 dB are lost
# Values of ⟨g, Δ⟩² that tell as much as one of independent Gaussians: those of a sample's positions are correlated, and
# have heavy tails. With 3 a sentence encoder gains 0.1 dB at 4 bits and 0.7 at 3.
_CORRELATED = 3
_ALONE = 4_000_000  # weights of a layer that all threads round together
_ROUNDS = 3  # allocations that may each ask for more widths
_REST = 1 << 29  # bytes beside weights and sums: the program, activations of a batch
_LEAST = 8  # sums of one pass may take 1 / _LEAST of the memory, whatever the rest takes


def memory_for_sums(network: Network, asked: int | None) -> int:
    """Return the bytes that the sums of one pass may take; asked: for the whole run."""
    bound = memory_bound(asked)
    return max(bound - detached_bytes(network.model) - _REST, bound // _LEAST)


def is_large(network: Network, config: Config) -> bool:
    """Whether the layers are measured one at a time."""
    weights = sum(math.prod(layer.linear.shape) for layer in network.layers)
    return weights >= LARGE and config.measure == "taylor"


@dataclass(frozen=True)
class LargeBench:
    """The steps that measure the layers of a large network.

    bench: of the same network; statistics: what is summed over the samples.
    """

    bench: Bench
    statistics: Statistics

    @classmethod
    def of(cls, bench: Bench) -> "LargeBench":
        prefix = "".join(c if c.isalnum() else "_" for c in bench.keep.name)
        memory = memory_for_sums(bench.network, bench.config.memory)
        return cls(bench, Statistics(bench.network, bench.keep.store.scratch, prefix, memory))

    def collect(self) -> dict[str, str]:
        """Collect all statistics. Returns the outputs of layers without an adjoint, with the reason."""
        bench, statistics, progress = self.bench, self.statistics, self.bench.keep.progress
        network, observation, runtime, fitting = bench.network, bench.observation, bench.runtime, bench.split.fitting
        passes = sum(1 for _ in portions(network.layers, statistics.memory))
        shown = bench.broadened()
        with progress.step("moments", len(shown) * passes) as advance:
            size = forward_batch(network, observation, runtime, len(shown))
            with_memory(lambda batch: statistics.collect(shown, batch, runtime, bench.pool, advance), size, observation)
        sensing, alone = fitting.some(SENSING), replace(network, activations=())
        with progress.step("sensitivity", len(sensing) * len(statistics.sensed_portions())) as advance:
            size = reverse_batch(network, observation, runtime, len(sensing), exact=False)
            plan = replace(bench.plan(alone, sensing), batch=size, draws=LEAST_DRAWS)
            with_memory(lambda batch: statistics.sense(replace(plan, batch=batch), advance), size, observation)
        measuring = bench.split.measuring
        with progress.step("taylor", len(measuring) * len(form_portions(network, statistics.memory))) as advance:
            plan = bench.plan(alone, measuring)
            return with_memory(
                lambda batch: measure_forms(replace(plan, batch=batch), statistics, advance), plan.batch, observation
            )

    def coarse(self) -> Layerwise:
        """Round all layers to nearest, and measure that."""
        bench = self.bench
        network, observation = bench.network, bench.observation
        offered = tuple(sorted({min(w, widest(network)) for w in bench.config.widths}))
        reach = {a.tensor: observation.reach(a.tensor) for a in network.activations}
        floors = scale_floors(network, reach)
        count = bench.plan(network, bench.split.measuring).averaged()
        layerwise = Layerwise(network, self.statistics, offered, floors, max(count // _CORRELATED, 1), bench.pool)
        lost = [k for k, layer in enumerate(network.layers) if lacks_gain(self.statistics, layer)]
        if lost:
            prober = bench.check(len(lost))
            with bench.keep.progress.step("probe", len(lost)) as advance:
                for k in lost:
                    layerwise.measure_gain(k, prober)
                    advance(1)
        with bench.keep.progress.step("rounding", len(network.layers)) as advance:
            self._each(lambda each, k: each.round_to_nearest(k), layerwise, range(len(network.layers)), advance)
        return layerwise

    def refine(self, layerwise: Layerwise, select: Callable[[Layers], Measurement], around: Around | None) -> Layers:
        """Compensate the widths that matter: those near what `around` takes, or all without it.

        select: makes a measurement of the layers' curves.
        """
        for _ in range(_ROUNDS if around is not None else 1):
            wanted = (
                self._all(layerwise) if around is None else self._near(layerwise, select(_layers(layerwise)), around)
            )
            if not wanted:
                break
            with self.bench.keep.progress.step("candidates", len(wanted)) as advance:
                self._each(partial(_compensate, wanted), layerwise, wanted, advance)
        return _layers(layerwise)

    def _each(
        self, task: Callable[[Layerwise, int], None], layerwise: Layerwise, indices: Iterable[int], advance: Advance
    ) -> None:
        """Run `task` for each layer: small ones at the same time, then large ones with all threads."""
        sizes = {k: math.prod(layerwise.network.layers[k].linear.shape) for k in indices}
        small, alone = [k for k in sizes if sizes[k] < _ALONE], replace(layerwise, workers=Alone())
        for _ in self.bench.pool.each(lambda k: task(alone, k), small):
            advance(1)
        for k in (k for k in sizes if sizes[k] >= _ALONE):
            task(layerwise, k)
            advance(1)

    def _all(self, layerwise: Layerwise) -> dict[int, NDArray[np.bool_]]:
        layers = layerwise.network.layers
        return {k: np.ones((x.linear.channels, len(layerwise.widths)), np.bool_) for k, x in enumerate(layers)}

    def _near(self, layerwise: Layerwise, measurement: Measurement, around: Around) -> dict[int, NDArray[np.bool_]]:
        """Return the widths near the allocated ones, of each layer that has a channel whose width is coarse."""
        widths, index = np.array(layerwise.widths), {x.name: k for k, x in enumerate(layerwise.network.layers)}
        bits = measurement.per_layer(around(measurement)[: measurement.channels])
        wanted = {}
        for layer, chosen in zip(measurement.network.layers, bits, strict=True):
            column = np.searchsorted(widths, chosen)
            fine = layerwise.state(layer).compensated[np.arange(len(chosen)), column] | (chosen == 0)
            near = np.abs(widths[None, :] - chosen[:, None]) <= REACH
            if not fine.all():
                wanted[index[layer.name]] = near & ~fine[:, None] if fine.any() else near
        return wanted


def _compensate(wanted: Mapping[int, NDArray[np.bool_]], layerwise: Layerwise, index: int) -> None:
    layerwise.compensate(index, wanted[index])


def at_full_width(layerwise: Layerwise) -> tuple[Candidates, list[Float]]:
    """Return the layers' codes at their widest, and their curves [1, units, widths], for the float fallback."""
    layers = _layers(layerwise)
    last = layerwise.widths[-1]
    candidates = tuple(LayerCandidates(m.layer, m.mean, ((m.codes[last],),)) for m, _ in layers)
    return Candidates(layerwise.widths, candidates, ()), [curves[None] for _, curves in layers]


def _layers(layerwise: Layerwise) -> Layers:
    layers = [layerwise.measured(layer) for layer in layerwise.network.layers]
    for measured, curves in layers:
        if not np.isfinite(curves).all():
            raise ModelError(
                f"the distortion of {measured.layer.name!r} is not finite; check its weights, or --exclude it"
            )
    return layers
