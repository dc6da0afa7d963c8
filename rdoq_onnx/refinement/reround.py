"""Rounding and measuring once more, at the point that was allocated."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.candidates import Candidates, integer_limit
from rdoq_onnx.candidates.layer_rows import LayerRows
from rdoq_onnx.candidates.moment_passes import collect
from rdoq_onnx.candidates.scale_floors import scale_floors
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import Measurement, curves_of
from rdoq_onnx.curves.shrinkage import squared_errors, steadied
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.emission.quantized_model import chosen_weights, quantized_model
from rdoq_onnx.gradients.backward import draws
from rdoq_onnx.gradients.batch_sizes import forward_batch, reverse_batch, with_memory
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.replace_weights import ReplaceWeights
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers

_DAMPING = 0.1


def rerounded(
    allocation: Allocation, portion: NDArray[np.int64], samples: Samples, runtime: Runtime, workers: Workers
) -> Allocation:
    """The layers of `portion` (indices) rounded again at their widths, their inputs those of the quantized network."""
    measurement = allocation.measurement
    network = measurement.network
    emitted = quantized_model(allocation)
    nodes = {n.name: n for n in emitted.graph.node}
    layers = []
    for layer in (network.layers[k] for k in portion):
        uses = (replace(u, data=nodes[u.node].input[1 - layer.linear.weight_side]) for u in layer.uses)
        layers.append(replace(layer, uses=tuple(uses)))
    quantized = replace(network, model=emitted, layers=tuple(layers))
    moments = with_memory(
        lambda batch: collect(quantized, samples, batch, runtime, workers, _unwatched),
        forward_batch(network, measurement.observation, runtime, len(samples)), measurement.observation,
    )  # fmt: skip
    floors = scale_floors(network, measurement.observation.ranges)
    codes, means = list(measurement.codes), list(measurement.means)
    for k, layer, moment in zip(portion.tolist(), layers, moments, strict=True):
        rows = LayerRows(Blocks(layer.linear), network.rows(layer), integer_limit(network), floors[k])
        widths = tuple(np.unique(allocation.layer_bits[k]).tolist())
        starts = rows.starts(moment.covariance, widths)
        codes[k] = {**codes[k], **rows.codes(moment.covariance, _DAMPING, starts)}
        means[k] = moment.mean
    return replace(allocation, measurement=replace(measurement, codes=tuple(codes), means=tuple(means)))


def remeasured(
    allocation: Allocation, config: Config, samples: Samples, runtime: Runtime, workers: Workers
) -> Measurement:
    """The measurement of `allocation` with first-order curves around the network whose weights are quantized."""
    measurement = allocation.measurement
    network, observation = measurement.network, measurement.observation
    weights = [
        (layer, layer.linear.tensor(codes.values), shift) for layer, codes, shift in chosen_weights(allocation)
    ]
    widths = tuple(measurement.codes[0])
    candidates = Candidates(
        widths,
        measurement.means,
        tuple((tuple(codes[b] for b in widths),) for codes in measurement.codes),
        tuple({b: (q,) for b, q in table.items()} for table in measurement.quantizers),
    )
    around = run_passes([ReplaceWeights(weights)], measurement.aimed.model)
    found = with_memory(lambda batch: first_order(
        measurement.aimed, candidates, samples, observation.metric, runtime,
        batch=batch, seed=config.seed, workers=workers, advance=_unwatched, around=around,
    ), reverse_batch(network, observation, runtime, len(samples)), observation)  # fmt: skip
    if found.missing:  # exact curves stay what they are
        return measurement
    seen = draws(len(samples), observation.metric.elements)
    steady = [
        steadied(curves[0], squared_errors(codes, network.rows(layer)), seen)
        for layer, (codes,), curves in zip(network.layers, candidates.weights, found.weights, strict=True)
    ]
    activations = [{b: float(v[0]) for b, v in table.items()} for table in found.activations]
    return replace(measurement, curves=curves_of(network, observation, widths, steady, activations))


def _unwatched(done: int) -> None:
    """Nobody is shown these steps' parts."""
