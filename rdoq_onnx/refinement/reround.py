"""Round and measure again at the allocated widths."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.candidates import integer_limit
from rdoq_onnx.candidates.layer_rows import LayerRows
from rdoq_onnx.candidates.moment_passes import collect
from rdoq_onnx.candidates.scale_floors import scale_floors
from rdoq_onnx.curves.divergence import as_candidates
from rdoq_onnx.curves.measurement import Measurement, curves_of, with_blocks
from rdoq_onnx.curves.shrinkage import shrunk_curves, squared_errors
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.emission.quantized_model import chosen_weights, quantized_model
from rdoq_onnx.gradients.batch_sizes import forward_batch, least_draws, reverse_batch, with_memory
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.replace_weights import ReplaceWeights
from rdoq_onnx.refinement.ridge import Regression
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers

_DAMPING = 0.1


def rerounded(
    allocation: Allocation,
    portion: NDArray[np.int64],
    samples: Samples,
    runtime: Runtime,
    workers: Workers,
    ridged: bool = False,
) -> Allocation:
    """Re-round the layers of `portion` (indices) at their widths, for their inputs in the quantized network.

    ridged: round what ridge regression on these inputs makes of the weights (ridge.py).
    """
    measurement = allocation.measurement
    network = measurement.network
    emitted = quantized_model(allocation)
    nodes = {n.name: n for n in emitted.graph.node}
    layers = []
    for layer in (network.layers[k] for k in portion):
        uses = (replace(u, data=nodes[u.node].input[1 - layer.linear.weight_side]) for u in layer.uses)
        layers.append(replace(layer, uses=tuple(uses)))
    quantized = replace(network, model=emitted, layers=tuple(layers))
    size = forward_batch(network, measurement.observation, runtime, len(samples))
    moments = with_memory(
        lambda batch: collect(quantized, samples, batch, runtime, workers, _unwatched), size, measurement.observation
    )
    weights = [network.rows(layer) for layer in layers]
    if ridged:
        triples = [(network.layers[k], layer, rows) for k, layer, rows in zip(portion, layers, weights, strict=True)]
        weights = Regression(network.model, emitted, triples).rows(samples, size, runtime)
    floors = scale_floors(network, measurement.observation.ranges)
    measured = list(measurement.layers)
    for k, layer, moment, weight in zip(portion.tolist(), layers, moments, weights, strict=True):
        limit, block = integer_limit(network), measured[k].block
        rows = LayerRows(Blocks(layer.linear), weight, limit, floors[k], block)
        widths = tuple(np.unique(allocation.layer_bits[k]).tolist())
        starts = rows.starts(moment.covariance, widths)
        codes = {**measured[k].codes, **rows.codes(moment.covariance, _DAMPING, starts)}
        measured[k] = replace(measured[k], codes=codes, mean=moment.mean)
    return replace(allocation, measurement=replace(measurement, layers=tuple(measured)))


def remeasured(allocation: Allocation, seed: int, samples: Samples, runtime: Runtime, workers: Workers) -> Measurement:
    """Measure first-order curves around the network with the quantized weights of `allocation`."""
    measurement = allocation.measurement
    network, observation = measurement.network, measurement.observation
    weights = [(layer, layer.linear.tensor(codes.values), shift) for layer, codes, shift in chosen_weights(allocation)]
    candidates = as_candidates(measurement)
    around = run_passes([ReplaceWeights(weights)], measurement.aimed.model, checked=False)  # outputs without a type
    size = reverse_batch(network, observation, runtime, len(samples))
    plan = ReversePlan(measurement.aimed, samples, observation.metric, runtime, workers, size, seed, around)
    plan = replace(plan, draws=least_draws(observation), name="re-measuring")
    found = with_memory(
        lambda batch: first_order(replace(plan, batch=batch), candidates, _unwatched), size, observation
    )
    if found.missing:  # leave exact curves as they are
        return measurement
    seen = plan.averaged()
    kept = [
        measurement.curves.distortion[rows][:, list(each.codes)]
        for each, rows in zip(measurement.layers, measurement.unit_rows(), strict=True)
        if each.layer.linear.axes
    ]
    steady = [
        shrunk_curves(curves[0], squared_errors(each.variants[0], network.rows(each.layer)), seen)
        for each, curves in zip(candidates.layers, found.weights, strict=True)
    ]
    activations = [{b: float(v[0]) for b, v in table.items()} for table in found.activations]
    changed = list(zip(measurement.layers, steady + kept, strict=True))
    curves = curves_of(network, observation, changed, activations)
    # Those of other block sizes are not measured again, so there is nothing left to choose.
    layers = [replace(x, options=()) for x in measurement.layers]
    return with_blocks(replace(measurement, curves=curves), layers, curves.distortion)


def _unwatched(done: int) -> None:
    """Ignore progress: the parts of these steps are not shown."""
