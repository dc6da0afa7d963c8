"""First-order curves of the divergence of rows of logits, beside those of the squared error.

The candidates are those that the squared error chose, one a width, so that this takes one more reverse pass. What exact
runs changed in the curves of the squared error (anchoring.py) changes these by the same factors.
"""

from dataclasses import replace

import numpy as np

from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.chosen import chosen_curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.gradients.batch_sizes import least_draws, reverse_batch
from rdoq_onnx.gradients.plan import LEAST_DRAWS, ReversePlan
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

FEWER = 2  # these curves tell channels apart, not the variants of rounding, so fewer v do


def with_divergence(
    measurement: Measurement, first: Measurement, config: Config, split: SampleSplit, runtime: Runtime, steps: Steps
) -> Measurement:
    """Add the curves of the divergence to `measurement` where "auto" weighs it beside the squared error.

    first: the same by first order alone.
    """
    observation, samples = first.observation, split.measuring
    metric = observation.metric.divergence
    if config.distortion != "auto" or config.measure == "probe" or metric is None or first.by_layer:
        return measurement
    size = reverse_batch(first.network, observation, runtime, len(samples))
    with workers(config.threads) as pool:
        plan = ReversePlan(first.aimed, samples, metric, runtime, pool, size, config.seed)
        plan = replace(plan, draws=max(least_draws(observation) // FEWER, LEAST_DRAWS))
        found = steps.step("divergence", len(samples), lambda advance: chosen_curves(first, plan, advance))
    if found is None:
        return measurement
    before, after = first.curves.distortion, measurement.curves.distortion
    usable = np.isfinite(before) & (before > 0)
    factors = np.where(usable, after, 1.0) / np.where(usable, before, 1.0)
    return replace(measurement, divergence=replace(found, distortion=found.distortion * factors))
