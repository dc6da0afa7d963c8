"""Candidates and curves of a large network, one layer at a time, from statistics that are sums over samples.

All widths are rounded to nearest first, which gives coarse curves. A first allocation on these tells which widths
matter for each channel; only those are rounded with error compensation, and their curves replace the coarse ones. The
codes are in the scratch folder from then on. What an earlier run left there is not made again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.candidates import integer_limit
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.candidates.statistics import Statistics
from rdoq_onnx.curves.forms import Form, Forms, kept_form, marginal
from rdoq_onnx.curves.layer_work import LayerWork, Rounded
from rdoq_onnx.curves.measurement import MeasuredLayer
from rdoq_onnx.curves.missing_forms import form_of, measured_gain
from rdoq_onnx.curves.select import with_options
from rdoq_onnx.curves.shrinkage import shrunk_curves, shrunk_variants
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.threads import Alone, Workers

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
Units = NDArray[np.int64]
Codes = tuple[NDArray[np.int8], NDArray[np.float32]]  # integers [widths, units, K], and scales of each width


@dataclass(frozen=True)
class LayerState:
    """What is known of a layer's channels at each width, [units, widths], with one of its block sizes.

    curves, errors: δ and ‖ΔW‖² of the codes so far. compensated: whether these are error-compensated.
    """

    curves: Float
    errors: Float
    compensated: Mask

    def packed(self) -> Float:
        return np.stack([self.curves, self.errors, self.compensated])

    @classmethod
    def of(cls, packed: NDArray[np.float64]) -> "LayerState":
        curves, errors, compensated = np.array(packed)
        return cls(curves, errors, compensated > 0)


@dataclass(frozen=True)
class Layerwise:
    """The weights of `network`, worked on one by one; `index` is that in its `weights`.

    widths: those offered to layers, ascending; stored weights, which are beside float data, get `all_widths`. floors:
    lower bounds on the scales of each layer's channels.
    draws: the number of values of ⟨g, Δ⟩² behind each curve.
    """

    network: Network
    statistics: Statistics
    widths: tuple[int, ...]
    all_widths: tuple[int, ...]
    floors: Sequence[Float | None]
    draws: int
    workers: Workers | Alone

    def measure_gain(self, index: int, prober: Prober) -> None:
        """Measure what stands in for the forms of a layer without an adjoint."""
        work = self._work(index)
        gain = measured_gain(work, self.statistics.moments(work.layer), self.widths_of(work.layer), prober)
        self.statistics.put("gain", work.layer, np.array([gain]))

    def round_to_nearest(self, index: int) -> None:
        """Make the curves of a layer at all widths and block sizes, by rounding to nearest.

        The codes are kept of the first block size alone; those of others are made again once they are wanted.
        """
        work = self._work(index)
        for block in work.layer.blocks:
            if self.statistics.has(_kind("state", block), work.layer):
                continue
            each = self._nearest(replace(work, block=block))
            curves, errors = (np.stack(v, axis=1) for v in zip(*((r.curves, r.errors) for r in each), strict=True))
            state = LayerState(self._shrunk(curves, errors), errors, np.zeros(curves.shape, np.bool_))
            self._keep(work.layer, block, None if block != work.layer.blocks[0] else _codes(each), state)

    def _nearest(self, work: LayerWork) -> list[Rounded]:
        """Round all units to nearest at each width."""
        covariance = self.statistics.moments(work.layer).covariance
        widths = self.widths_of(work.layer)
        parts = self.workers.map(lambda units: work.nearest(units, covariance, widths), work.parts(work.all))
        return [Rounded.joined(by_width) for by_width in zip(*parts, strict=True)]

    def compensate(self, index: int, block: int, wanted: Mask) -> None:
        """Round `wanted` [units, widths] with error compensation, as far as that is not done yet."""
        work, widths = replace(self._work(index), block=block), self.widths_of(self.network.weights[index])
        state = self.state(work.layer, block)
        wanted = wanted & ~state.compensated & (np.array(widths) > 0)
        if not wanted.any():
            return
        if self._made(work.layer, block):
            names = (_kind(name, block) for name in ("codes", "scales"))
            integers, scales = (np.array(self.statistics.get(name, work.layer)) for name in names)
        else:
            integers, scales = _codes(self._nearest(work))
        variants = self.statistics.moments(work.layer).variants()
        compensators = [Compensator.of(*each) for each in (variants[:1] if marginal(self.network) else variants)]
        for k in np.flatnonzero(wanted.any(axis=0)):
            units = np.flatnonzero(wanted[:, k])
            chosen = self._compensated(work, units, widths[k], scales[k], compensators)
            integers[k, units], scales[k, units] = chosen.codes.integers, chosen.codes.scales
            state.errors[units, k] = chosen.errors
            state.curves[units, k] = self._shrunk(chosen.curves[:, None], chosen.errors[:, None])[:, 0]
        compensated = replace(state, compensated=state.compensated | wanted)
        self._keep(work.layer, block, (integers, scales), compensated)

    def widths_of(self, layer: Layer) -> tuple[int, ...]:
        """Return the widths offered to `layer`."""
        return self.all_widths if layer.linear.axes else self.widths

    def state(self, layer: Layer, block: int) -> LayerState:
        return LayerState.of(self.statistics.get(_kind("state", block), layer))

    def measured(self, layer: Layer, made: bool) -> tuple[MeasuredLayer, Float]:
        """Return a layer's options (`with_options`) and the curves [units, widths] of the first.

        made: leave out what has no codes yet; else those are empty.
        """
        found = [
            (block, self._spooled(layer, block), self.state(layer, block).curves)
            for block in layer.blocks
            if self._made(layer, block) or not made
        ]
        mean = self.statistics.moments(layer).mean
        return with_options(MeasuredLayer(layer, {}, mean), self.widths_of(layer), found)

    def _made(self, layer: Layer, block: int) -> bool:
        return self.statistics.has(_kind("codes", block), layer)

    def _spooled(self, layer: Layer, block: int) -> Mapping[int, WeightCodes]:
        if not self._made(layer, block):
            return {}
        name, scales = self.statistics.name(_kind("codes", block), layer), _kind("scales", block)
        folder = str(self.statistics.scratch.folder)
        return SpooledCodes(folder, name, self.widths_of(layer), np.array(self.statistics.get(scales, layer)))

    def _compensated(
        self, work: LayerWork, units: Units, bits: int, scales: NDArray[np.float32], compensators: Sequence[Compensator]
    ) -> Rounded:
        """Round `units` of a layer to `bits` bits in several variants, and choose the best for each."""
        parts = work.parts(units)
        tasks = [(part, compensator) for compensator in compensators for part in parts]
        rounded = self.workers.map(lambda task: work.compensated(task[0], bits, scales[task[0]], task[1]), tasks)
        joined = (Rounded.joined(rounded[k : k + len(parts)]) for k in range(0, len(rounded), len(parts)))
        # Of a layer with groups, all channels were rounded.
        variants = [v if len(v.curves) == len(units) else v.taken(units) for v in joined]
        if len(variants) == 1:
            return variants[0]
        curves = np.stack([v.curves for v in variants])[..., None]
        return Rounded.best(variants, shrunk_variants(curves, self.draws)[..., 0].argmin(axis=0))

    def _work(self, index: int) -> LayerWork:
        layer = self.network.weights[index]
        form = Forms((form_of(self.statistics, layer), *self._tied(layer)))
        return LayerWork(layer, self.network.rows(layer), form, integer_limit(self.network), self.floors[index])

    def _tied(self, layer: Layer) -> Iterator[Form]:
        """Yield the forms of tables tied to `layer`."""
        for tie in self.network.ties:
            if tie.layer == layer.name and self.statistics.has("powers", tie.table):
                yield kept_form(self.statistics, tie.table)

    def _shrunk(self, curves: Float, errors: Float) -> Float:
        return shrunk_curves(curves, errors, self.draws)

    def _keep(self, layer: Layer, block: int, codes: Codes | None, state: LayerState) -> None:
        # The state last: without it, an interrupted layer is made again from the scales it had.
        for name, array in zip(("scales", "codes"), reversed(codes or ()), strict=False):
            self.statistics.put(_kind(name, block), layer, array)
        self.statistics.put(_kind("state", block), layer, state.packed())


def _kind(name: str, block: int) -> str:
    """Name what the statistics keep for a block size."""
    return f"{name}{block or ''}"


def _codes(rounded: Sequence[Rounded]) -> Codes:
    """Return integers [widths, units, K] and scales of all widths."""
    return np.stack([r.codes.integers for r in rounded]), np.stack([r.codes.scales for r in rounded])
