"""Measure δ of the weights outside the search (tables, cells, stacks), which no curve predicts."""

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.emission.weight_only import with_weight_only
from rdoq_onnx.system.runtime import Runtime


def unsearched_distortion(allocation: Allocation, samples: Samples, runtime: Runtime) -> float:
    """Return δ with only the weights outside the search quantized, all else in float; 0 without any."""
    measurement = allocation.measurement
    network, observation = measurement.network, measurement.observation
    if not network.weight_only:
        return 0.0
    model, metric = measurement.aimed.model, observation.metric
    widths = zip(network.weight_only, allocation.weight_only_bits, strict=True)
    exact, changed = (runtime.session(m) for m in (model, with_weight_only(model, list(widths))))
    total = 0.0
    for count, feeds in samples.counted_batches(observation.batching.size):
        values, expected = (session.run(feeds, metric.outputs) for session in (changed, exact))
        total += float(metric.errors(values, expected, count).sum())
    return total / len(samples)
