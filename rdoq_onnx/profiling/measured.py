"""Measure what each layer takes in ONNX Runtime on this CPU, as rows of a cost in microseconds.

Only three forms differ there: float, integers of any width from 1 to 8, and channels of 0 bits, which are removed. Each
is profiled as a whole network, since a sum of layers by themselves would leave out conversions of layout and type:

    c(float), c(1-8)   the layer's nodes, and those that convert for it
    c(0)               c(1-8) · (1 - η), of all channels; c(1-8) where none can be removed
    η                  (what removing a quarter of each layer's channels saves) / Σ c(1-8) · (share removed)

Both the time of whole runs and the sum over a profile are upper bounds, as other load adds to the one and profiling to
the other; the smaller one counts, at the first quartile over runs.
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
from rdoq_onnx.system.runtime import Feeds, Runtime
from rdoq_onnx.system.turns import turns

_RUNS = 60  # of a profile, and whole ones
_SECONDS = 3.0  # for whole runs of a model
_QUARTILE = 0.25
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
    feeds = one_run(samples)
    nodes = {use.node for layer in network.searched for use in layer.uses} | {p.node for p in network.products}
    in_float, integers, fewer = (_profiled(model, feeds, sorted(nodes), runtime) for model in models)
    shares = {
        layer.uses[0].node: len(removed.removed.get(layer.uses[0].node, ())) / layer.linear.channels
        for layer in network.searched
    }
    saved = sum(integers.values()) - sum(fewer.values())
    expected = sum(integers[node] * share for node, share in shares.items())
    gain = min(max(saved / expected, 0.0), 1.0) if expected else 0.0
    return Cost("measured", PRESETS["measured"], tuple(_rows(measurement, (in_float, integers), shares, gain)))


def one_run(samples: Samples) -> Feeds:
    """Return one sample of the most common shape, or the batch that the model fixes."""
    return samples.of_common_shapes(1).feeds(slice(0, samples.batch or 1))


def run_seconds(model: onnx.ModelProto, feeds: Feeds, runtime: Runtime) -> float:
    """Return the seconds of a run on the CPU, of whole runs or of a profile's nodes, whichever is less."""
    session = replace(runtime, provider="cpu").session(model, "all")
    taken = turns([lambda: session.run(feeds)], _SECONDS, _RUNS)
    whole = float(np.quantile(np.asarray(taken)[..., 0], _QUARTILE))
    seconds, _ = runtime.profiled(model, feeds, _RUNS)
    return min(whole, sum(float(np.quantile(each, _QUARTILE)) for each in seconds.values()))


def _profiled(model: onnx.ModelProto, feeds: Feeds, nodes: Sequence[str], runtime: Runtime) -> dict[str, float]:
    """Return the microseconds of each of `nodes`, which add up to a run. Raises ModelError if none is found."""
    seconds, optimized = runtime.profiled(model, feeds, _RUNS)
    each = times_by_node(model, optimized, seconds, nodes)
    total = sum(each.values())
    if not total:
        raise ModelError("--cost measured: ONNX Runtime's profile shows no layer")
    whole = run_seconds(model, feeds, runtime)
    return {name: 1e6 * value * whole / total for name, value in each.items()}


def _rows(
    measurement: Measurement, forms: Sequence[Mapping[str, float]], removed: Mapping[str, float], gain: float
) -> list[CostRow]:
    """removed: the share of a layer's channels that could be removed, by its first node. gain: η."""
    in_float, integers = forms
    network = measurement.network
    rows = []
    for layer in network.searched:
        for use in layer.uses:
            name, own = as_pattern(use.node), integers[use.node]
            gone = own * (1 - gain) if removed[layer.uses[0].node] else own
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
