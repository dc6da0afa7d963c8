"""Measure what each layer takes in ONNX Runtime on this CPU, as rows of a cost in microseconds.

Only three forms differ there: float, integers of any width from 1 to 8, and channels of 0 bits, which are removed. The
first two are profiled as whole networks, since a sum of layers by themselves would leave out conversions of layout and
type; what channels are worth beside that follows from models of each layer alone (micro_models.py, prices.py):

    c(1-8) = own                   of all channels of a node; of all nodes they add up to the network
    c(0)   = max(own - η saved, 0), or `own` where no channel can be removed
    η      = (what the network saves without a quarter of its channels) / (the same by these costs), at most 1

Both the time of whole runs and the sum over a profile are upper bounds, as other load adds to the one and profiling to
the other; the smaller one counts, at the first quartile over runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import uniform_bits
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import as_pattern
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.cost.template import DIGITS
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.errors import BudgetError, ModelError
from rdoq_onnx.model.cost_rows import FLOAT, PRESETS, WIDEST, Cost, CostRow
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.observation.shapes import shapes_of
from rdoq_onnx.profiling.attribution import times_by_node
from rdoq_onnx.profiling.micro_models import Slopes, channel_slopes
from rdoq_onnx.profiling.prices import Price, prices_of
from rdoq_onnx.system.runtime import Feeds, Runtime
from rdoq_onnx.system.turns import run_times, turns

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
    whole = emit_model(widest, {}, "int8", keep_channels=True).model
    fewer = emit_model(_without_part(widest), {}, "int8")
    feeds = one_run(samples)
    nodes = {use.node for layer in network.searched for use in layer.uses} | {p.node for p in network.products}
    in_float, integers = (_profiled(model, feeds, sorted(nodes), runtime) for model in (measurement.source, whole))
    shares = {
        use.node: len(fewer.removed.get(layer.uses[0].node, ())) / layer.linear.channels
        for layer in network.searched
        for use in layer.uses
    }
    removable = {node for node, share in shares.items() if share}
    prices = prices_of(network, integers, _slopes(network, samples, runtime), removable)
    expected = sum(prices[node].saved * share for node, share in shares.items())
    saved = _saved_share((whole, fewer.model), feeds, runtime) * sum(integers.values())
    gain = min(max(saved / expected, 0.0), 1.0) if expected else 0.0
    # As they are kept in a file, so that a run with the file has the same ones.
    rows = (replace(r, cost=float(f"{r.cost:.{DIGITS}g}")) for r in _rows(network, in_float, integers, prices, gain))
    return Cost("measured", PRESETS["measured"], tuple(rows))


def one_run(samples: Samples) -> Feeds:
    """Return one sample of the most common shape, or the batch that the model fixes."""
    return samples.of_common_shapes(1).feeds(slice(0, samples.batch or 1))


def run_seconds(model: onnx.ModelProto, feeds: Feeds, runtime: Runtime) -> float:
    """Return the seconds of a run on the CPU, of whole runs or of a profile's nodes, whichever is less."""
    session = replace(runtime, provider="cpu").session(model, "all")
    taken = turns([lambda: session.run(feeds)], _SECONDS, _RUNS)
    whole = float(np.quantile(run_times(taken, busy=False), _QUARTILE))
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


def _saved_share(models: Sequence[onnx.ModelProto], feeds: Feeds, runtime: Runtime) -> float:
    """Return the share of the first model's time that the second one saves, of runs in turns."""
    sessions = [replace(runtime, provider="cpu").session(model, "all") for model in models]
    taken = turns([partial(session.run, feeds) for session in sessions], _SECONDS, _RUNS)
    first, second = np.quantile(run_times(taken, busy=False), _QUARTILE, axis=0)
    return 1 - float(second) / float(first)


def _slopes(network: Network, samples: Samples, runtime: Runtime) -> dict[str, Slopes]:
    """Return the slopes of each node of the searched weights; layers of the same sizes are timed once."""
    shapes = shapes_of(network.model, samples.of_common_shapes(1), runtime)
    known: dict[tuple[Linear, tuple[int, ...]], Slopes] = {}
    result = {}
    for use in (use for layer in network.searched for use in layer.uses):
        if use.data not in shapes:
            result[use.node] = Slopes()
            continue
        key = use.linear, (samples.batch or 1, *shapes[use.data][1:])
        if key not in known:
            known[key] = channel_slopes(*key, runtime)
        result[use.node] = known[key]
    return result


def _rows(
    network: Network,
    in_float: Mapping[str, float],
    integers: Mapping[str, float],
    prices: Mapping[str, Price],
    gain: float,
) -> Iterator[CostRow]:
    """gain: η."""
    for node, price in prices.items():
        name = as_pattern(node)
        yield CostRow(name, (0, 0), _ANY, max(price.own - gain * price.saved, 0.0))
        yield CostRow(name, _INTEGERS, _ANY, price.own)
        yield CostRow(name, _FLOATS, _FLOATS, in_float[node])
    for product in network.products:
        yield CostRow(as_pattern(product.node), _ANY, _ANY, integers[product.node])
        yield CostRow(as_pattern(product.node), _FLOATS, _FLOATS, in_float[product.node])


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
