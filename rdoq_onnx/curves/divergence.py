"""The divergence of rows of logits over the squared error, for each row of the curves.

Both are quadratic forms of the same change, so that their ratio hardly depends on the width or on the blocks of scales:

    ρ = exp mean_b log (δ_kl(b) / δ(b)).

The candidates are those that the squared error chose, one a width, so that this takes one more reverse pass.
"""

from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.curves.shrinkage import shrunk_curves, squared_errors
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.gradients.batch_sizes import least_draws, reverse_batch, with_memory
from rdoq_onnx.gradients.plan import LEAST_DRAWS, ReversePlan
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.observation.parts import find_parts
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

Float = NDArray[np.float64]
_FEW = 3.5  # bits of weights up to which perplexity gains by it; at 4 bits it lost half a percent
FEWER = 2  # the ratios tell channels apart, not the variants of rounding, so fewer v do


def few_bits(config: Config) -> bool:
    """Whether "auto" minimizes the divergence if the network is a language model."""
    budgeted = config.size is None and not config.spends_cost and not config.seeks
    return config.distortion == "auto" and budgeted and config.weight_bits <= _FEW


def has_rows(model: onnx.ModelProto) -> bool:
    """Whether an output may hold several rows of logits a sample, along its last axis of 3 or more."""
    ranks = {o.name: len(o.type.tensor_type.shape.dim) for o in model.graph.output}
    pieces = [piece for part in find_parts(model) for piece in part.pieces]
    return any(piece.classes == -1 and ranks[piece.output] != 2 for piece in pieces)


def chosen_metric(metric: Metric, config: Config) -> Metric:
    """Return the metric that the curves are of. Raises ConfigError.

    "auto" takes the divergence of a language model's rows beside few bits; else it begins with the squared error.
    """
    if config.distortion != "kl" and not (few_bits(config) and metric.sequential):
        return metric
    if metric.divergence is None:
        other = next(part.name for part in metric.parts if not part.cached and part.pieces[0].classes is None)
        raise ConfigError(f"--distortion kl: output {other!r} holds no rows of logits; give --distortion mse or auto")
    return metric.divergence


def second_metric(metric: Metric, config: Config) -> Metric | None:
    """Return the divergence where "auto" weighs it beside the squared error, which is then the chosen `metric`."""
    return metric.divergence if config.distortion == "auto" and metric.name == "mse" else None


def with_divergence(
    measurement: Measurement, first: Measurement, config: Config, split: SampleSplit, runtime: Runtime, steps: Steps
) -> Measurement:
    """Add the ratios to `measurement` where "auto" weighs the divergence beside the squared error.

    first: the same by first order alone.
    """
    observation, samples = first.observation, split.measuring
    metric = second_metric(observation.metric, config)
    skipped = config.measure == "probe" or first.by_layer
    if skipped or metric is None or not as_candidates(first).layers:
        return measurement
    size = reverse_batch(first.network, observation, runtime, len(samples))
    with workers(config.threads, steps.unsharded()) as pool:
        plan = ReversePlan(first.aimed, samples, metric, runtime, pool, size, config.seed)
        plan = replace(plan, draws=max(least_draws(observation) // FEWER, LEAST_DRAWS), name="divergence")
        found = steps.step("divergence", len(samples), lambda advance: _ratios(first, plan, advance))
    return replace(measurement, divergence=found)


def as_candidates(measurement: Measurement) -> Candidates:
    """Return the candidates that `measurement` chose, one per width, but for tables."""
    widths = tuple(measurement.layers[0].codes) if measurement.layers else ()
    multiplied = (x for x in measurement.layers if not x.layer.linear.axes)
    layers = (LayerCandidates(x.layer, x.mean, (tuple(x.codes[b] for b in widths),)) for x in multiplied)
    activations = (
        ActivationCandidates(x.activation, {b: (q,) for b, q in x.quantizers.items()}) for x in measurement.activations
    )
    return Candidates(widths, tuple(layers), tuple(activations))


def _ratios(measurement: Measurement, plan: ReversePlan, advance: Advance) -> Float:
    """Return ρ of each row of the curves, NaN where it was not measured."""
    candidates, network, own = as_candidates(measurement), measurement.network, measurement.curves.distortion
    found = with_memory(
        lambda batch: first_order(replace(plan, batch=batch), candidates, advance), plan.batch, measurement.observation
    )
    result = np.full(len(own), np.nan)
    curves = {each.layer.name: v for each, v in zip(candidates.layers, found.weights, strict=True)}
    for each, rows in zip(measurement.layers, measurement.unit_rows(), strict=True):
        if each.layer.name in curves:
            errors = squared_errors(list(each.codes.values()), network.rows(each.layer))
            steady = shrunk_curves(curves[each.layer.name][0], errors, plan.averaged())
            result[rows] = _ratio(steady, own[rows][:, list(each.codes)])
    for row, values in enumerate(found.activations, measurement.channels):
        result[row] = _ratio(np.array([[float(v[0]) for v in values.values()]]), own[[row]][:, list(values)])[0]
    return result


def _ratio(divergence: Float, error: Float) -> Float:
    """Return ρ of curves [rows, widths], NaN where neither is positive at any width."""
    usable = np.isfinite(divergence) & np.isfinite(error) & (divergence > 0) & (error > 0)
    logs = np.log(np.where(usable, divergence, 1.0)) - np.log(np.where(usable, error, 1.0))
    count = usable.sum(axis=1)
    ratios: Float = np.where(count > 0, np.exp(logs.sum(axis=1) / np.maximum(count, 1)), np.nan)
    return ratios
