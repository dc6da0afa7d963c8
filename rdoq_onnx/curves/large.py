"""Measure the weights of a large network: statistics, then layer by layer, coarse to fine.

The per-sample products of taylor.py need all candidates of all layers at once, about 140 bytes a weight. From
LARGE weights on, curves are quadratic forms (forms.py) instead, and one layer's candidates are in memory at a time.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates, widest
from rdoq_onnx.candidates.moment_passes import portions
from rdoq_onnx.candidates.scale_floors import scale_floors
from rdoq_onnx.candidates.statistics import Statistics
from rdoq_onnx.candidates.table_rows import TableRows
from rdoq_onnx.config import Config
from rdoq_onnx.curves.forms import form_portions, measure_forms
from rdoq_onnx.curves.layer_tasks import spread
from rdoq_onnx.curves.layerwise import Layerwise
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.curves.missing_forms import lacks_gain
from rdoq_onnx.curves.select import Layers
from rdoq_onnx.curves.steps import SENSING, Bench
from rdoq_onnx.curves.stored_forms import stored_statistics
from rdoq_onnx.errors import ModelError
from rdoq_onnx.gradients.batch_sizes import forward_batch, reverse_batch, with_memory
from rdoq_onnx.gradients.plan import LEAST_DRAWS
from rdoq_onnx.model.external import detached_bytes
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.system.memory import memory_bound
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.summation import here
from rdoq_onnx.system.threads import Alone

Float = NDArray[np.float64]
# The block size of each layer of a measurement, and the width of each row of its curves, that an allocation takes.
Around = Callable[[Measurement], tuple[tuple[int, ...], NDArray[np.int64]]]
Wanted = Mapping[tuple[int, int], NDArray[np.bool_]]  # by a layer's index and block size, [units, widths]

Key = TypeVar("Key", bound=Hashable)

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
    weights = sum(math.prod(layer.linear.shape) for layer in network.searched)
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

    def collect(self, rows: Mapping[str, TableRows]) -> dict[str, str]:
        """Collect all statistics. Returns the outputs of layers without an adjoint, with the reason.

        rows: of tables, by name.
        """
        self._put_stored(rows)
        self.moments()
        bench, statistics, progress = self.bench, self.statistics, self.bench.keep.progress
        network, observation, runtime, fitting = bench.network, bench.observation, bench.runtime, bench.split.fitting
        sensing, alone = fitting.some(SENSING), replace(network, activations=())
        with progress.step("sensitivity", len(sensing) * len(statistics.sensed_portions())) as advance:
            size = reverse_batch(network, observation, runtime, len(sensing), exact=False)
            plan = replace(bench.plan(alone, sensing, "sensitivity"), batch=size, draws=LEAST_DRAWS)
            with_memory(lambda batch: statistics.sense(replace(plan, batch=batch), advance), size, observation)
        measuring = bench.split.measuring
        with progress.step("taylor", len(measuring) * len(form_portions(network, statistics.memory))) as advance:
            plan = bench.plan(alone, measuring, "forms", in_graph=False)
            return with_memory(
                lambda batch: measure_forms(replace(plan, batch=batch), statistics, advance), plan.batch, observation
            )

    def moments(self) -> None:
        """Collect the moments of all inputs, as far as they are not kept yet."""
        bench, statistics = self.bench, self.statistics
        passes, shown = sum(1 for _ in portions(bench.network.layers, statistics.memory)), bench.broadened()
        with bench.keep.progress.step("moments", len(shown) * passes) as advance:
            size = forward_batch(bench.network, bench.observation, bench.runtime, len(shown))
            with_memory(
                lambda batch: statistics.collect(shown, batch, bench.runtime, bench.pool, advance),
                size,
                bench.observation,
            )

    def _put_stored(self, rows: Mapping[str, TableRows]) -> None:
        """Keep what stands for the statistics of weights that no product unfolds."""
        network, statistics = self.bench.network, self.statistics
        for layer in network.unmultiplied:
            for name, array in stored_statistics(layer, rows.get(layer.name)).items():
                statistics.put(name, layer, array)

    def coarse(self) -> Layerwise:
        """Make what rounds the layers, with the gains of those without an adjoint."""
        bench = self.bench
        network, observation = bench.network, bench.observation
        offered = tuple(sorted({min(w, widest(network)) for w in bench.config.widths}))
        reach = {a.tensor: observation.reach(a.tensor) for a in network.activations}
        floors = scale_floors(network, reach)
        count = bench.plan(network, bench.split.measuring, in_graph=False).averaged()
        floors += [None] * (len(network.weights) - len(floors))
        widths, seen = (offered, tuple(bench.config.widths)), bench.independent(max(count // _CORRELATED, 1))
        layerwise = Layerwise(network, self.statistics, *widths, floors, seen, bench.pool)
        lost = [k for k, layer in enumerate(network.weights) if lacks_gain(self.statistics, layer)]
        if lost:
            prober = bench.check(len(lost))
            with bench.keep.progress.step("probe", len(lost)) as advance:
                for k in lost:
                    layerwise.measure_gain(k, prober)
                    advance(1)
        return layerwise

    def round(self, layerwise: Layerwise, layers: Sequence[Layer]) -> None:
        """Round `layers` to nearest, and measure that."""
        index = _indices(layerwise)
        with self.bench.keep.progress.step("rounding", len(layers)) as advance:
            chosen = {k: k for k in (index[layer.name] for layer in layers)}
            self._each(Layerwise.round_to_nearest, layerwise, chosen, advance)

    def refine(
        self,
        layerwise: Layerwise,
        layers: Sequence[Layer],
        select: Callable[[Layers], Measurement],
        around: Around | None,
    ) -> Layers:
        """Compensate the widths of `layers` that matter: those near what `around` takes, or all without it.

        select: makes a measurement of the layers' curves.
        """
        for _ in range(_ROUNDS if around is not None else 1):
            if around is None:
                wanted = _all(layerwise, layers)
            else:
                wanted = _near(layerwise, select(measured_layers(layerwise, layers, made=False)), around)
            if not wanted:
                break
            with self.bench.keep.progress.step("candidates", len(wanted)) as advance:
                self._each(partial(_compensate, wanted), layerwise, {key: key[0] for key in wanted}, advance)
        return measured_layers(layerwise, layers)

    def _each(
        self, task: Callable[[Layerwise, Key], None], layerwise: Layerwise, keys: Mapping[Key, int], advance: Advance
    ) -> None:
        """Run `task` for each of `keys`, given with its layer: small ones at once, then large ones with all threads.

        Where other processes compute, each takes whole layers.
        """
        compute = self.bench.pool.sums.compute
        if compute is not here:
            for _ in spread(task, layerwise, keys, compute):
                advance(1)
            return
        sizes = {key: math.prod(layerwise.network.weights[k].linear.shape) for key, k in keys.items()}
        small, alone = [k for k in sizes if sizes[k] < _ALONE], replace(layerwise, workers=Alone())
        for _ in self.bench.pool.each(lambda k: task(alone, k), small):
            advance(1)
        for k in (k for k in sizes if sizes[k] >= _ALONE):
            task(layerwise, k)
            advance(1)


def _indices(layerwise: Layerwise) -> dict[str, int]:
    return {x.name: k for k, x in enumerate(layerwise.network.weights)}


def _all(layerwise: Layerwise, layers: Sequence[Layer]) -> Wanted:
    """Return all widths of all channels of `layers` at all block sizes."""
    index = _indices(layerwise)
    shapes = {x.name: (x.linear.channels, len(layerwise.widths_of(x))) for x in layers}
    return {(index[x.name], b): np.ones(shapes[x.name], np.bool_) for x in layers for b in x.blocks}


def _near(layerwise: Layerwise, measurement: Measurement, around: Around) -> Wanted:
    """Return the widths near the allocated ones, of each layer that has a channel whose width is coarse."""
    index = _indices(layerwise)
    blocks, rows = around(measurement)
    bits = measurement.per_layer(rows[: measurement.channels])
    wanted = {}
    for layer, block, chosen in zip(measurement.network.searched, blocks, bits, strict=True):
        widths = np.array(layerwise.widths_of(layer))
        column = np.searchsorted(widths, chosen)
        fine = layerwise.state(layer, block).compensated[np.arange(len(chosen)), column] | (chosen == 0)
        near = np.abs(widths[None, :] - chosen[:, None]) <= REACH
        if not fine.all():
            wanted[index[layer.name], block] = near & ~fine[:, None] if fine.any() else near
    return wanted


def _compensate(wanted: Wanted, layerwise: Layerwise, key: tuple[int, int]) -> None:
    layerwise.compensate(*key, wanted[key])


def at_full_width(layerwise: Layerwise) -> tuple[Candidates, list[Float]]:
    """Return the layers' codes at their widest, and their curves [1, units, widths], for the float fallback."""
    layers = measured_layers(layerwise, layerwise.network.layers)
    last = layerwise.widths[-1]
    candidates = tuple(LayerCandidates(m.layer, m.mean, ((m.codes[last],),)) for m, _ in layers)
    return Candidates(layerwise.widths, candidates, ()), [curves[None] for _, curves in layers]


def measured_layers(layerwise: Layerwise, layers: Sequence[Layer], made: bool = True) -> Layers:
    """Return the codes and curves of `layers`. Raises ModelError if a curve is not finite.

    made: without the block sizes that have coarse curves and no codes.
    """
    found = [layerwise.measured(layer, made) for layer in layers]
    for measured, curves in found:
        if not np.isfinite(curves).all():
            raise ModelError(
                f"the distortion of {measured.layer.name!r} is not finite; check its weights, or --exclude it"
            )
    return found
