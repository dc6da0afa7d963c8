"""Measure what each layer takes in ONNX Runtime on this CPU, as rows of a cost in microseconds.

Only three forms differ there: float, integers of any width from 1 to 8, and channels of 0 bits, which are removed. Each
is profiled as a whole network, since a sum of layers by themselves would leave out conversions of layout and type:

    c(float), c(1-8)   the layer's nodes, and those that convert for it
    c(0)               c(1-8) - (what a quarter of the network's channels removed saved here) / (share of its channels)

c(0) is of all channels, c(1-8) where none can be removed. Each form is scaled to the time of whole runs, in turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import uniform_bits
from rdoq_onnx.analysis.patterns import as_pattern
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.errors import BudgetError, ModelError
from rdoq_onnx.model.cost_rows import FLOAT, PRESETS, WIDEST, Cost, CostRow
from rdoq_onnx.profiling.attribution import times_by_node
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.turns import turns

_RUNS = 40  # of each profile
_SECONDS = 4.0  # for whole runs, in turns
_PART = 0.25  # share of the channels removed in the third form
_ANY, _INTEGERS, _FLOATS = (0, FLOAT), (1, WIDEST), (FLOAT, FLOAT)


def measured_cost(measurement: Measurement, config: Config, samples: Samples, runtime: Runtime) -> Cost:
    """Return the rows of all layers and products, in µs of a run with one sample, or the batch that the model fixes.

    Raises ModelError if the network does not run, BudgetError if pins leave no form at full width.
    """
    network = measurement.network
    widest = uniform_bits(measurement, replace(config, budget=None, cost=None, weight_bits=8.0).budgets)
    if widest is None:
        raise BudgetError("--cost measured times the network at full width, for which pins or limits leave no room")
    removed = emit_model(_without_part(widest), {}, "int8")
    models = [measurement.source, emit_model(widest, {}, "int8", keep_channels=True).model, removed.model]
    feeds = samples.of_common_shapes(1).feeds(slice(0, samples.batch or 1))
    nodes = {use.node for layer in network.searched for use in layer.uses} | {p.node for p in network.products}
    forms = []
    for model, whole in zip(models, _whole_runs(models, feeds, runtime), strict=True):
        seconds, optimized = runtime.profiled(model, feeds, _RUNS)
        each = times_by_node(model, optimized, seconds, sorted(nodes))
        total = sum(each.values())
        if not total:
            raise ModelError("--cost measured: ONNX Runtime's profile shows no layer")
        forms.append({name: 1e6 * value * whole / total for name, value in each.items()})
    shares = {node: len(channels) for node, channels in removed.removed.items()}
    return Cost("measured", PRESETS["measured"], tuple(_rows(measurement, forms, shares)))


def _rows(measurement: Measurement, forms: Sequence[Mapping[str, float]], removed: Mapping[str, int]) -> list[CostRow]:
    in_float, integers, fewer = forms
    network = measurement.network
    rows = []
    for layer in network.searched:
        for use in layer.uses:
            name, own = as_pattern(use.node), integers[use.node]
            share = removed.get(layer.uses[0].node, 0) / layer.linear.channels
            gone = min(max(own - (own - fewer[use.node]) / share, 0.0), own) if share else own
            rows.append(CostRow(name, (0, 0), _ANY, gone))
            rows.append(CostRow(name, _INTEGERS, _ANY, own))
            rows.append(CostRow(name, _FLOATS, _FLOATS, in_float[use.node]))
    for product in network.products:
        rows.append(CostRow(as_pattern(product.node), _ANY, _ANY, integers[product.node]))
        rows.append(CostRow(as_pattern(product.node), _FLOATS, _FLOATS, in_float[product.node]))
    return rows


def _without_part(widest: Allocation) -> Allocation:
    """Return `widest` with the channels of least δ of each layer at 0 bits, as far as that is allowed."""
    distortion = widest.measurement.curves.distortion
    bits = []
    for own, rows in zip(widest.layer_bits, widest.measurement.unit_rows(), strict=True):
        cost = distortion[rows, 0]
        order = np.argsort(cost, kind="stable")[: int(_PART * len(own))]
        order = order[np.isfinite(cost[order])]
        bits.append(np.where(np.isin(np.arange(len(own)), order), 0, own))
    return replace(widest, layer_bits=tuple(bits))


def _whole_runs(models: Sequence[onnx.ModelProto], feeds: Mapping[str, np.ndarray], runtime: Runtime) -> list[float]:
    """Return the seconds of a run of each model, the first quartile over turns: other load only adds."""
    on_cpu = replace(runtime, provider="cpu")
    sessions = [on_cpu.session(model, "all") for model in models]
    taken = turns([lambda session=session: session.run(feeds) for session in sessions], _SECONDS)  # type: ignore[misc]
    return [float(value) for value in np.quantile(np.asarray(taken), 0.25, axis=0)]
