"""Measure δ of the weights outside the search (tables, cells, stacks), which no curve predicts."""

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.weight_only import with_weight_only
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.refinement.reference import Reference


def unsearched_distortion(allocation: Allocation, reference: Reference) -> float:
    """Return δ with only the weights outside the search quantized, all else in float; 0 without any."""
    measurement = allocation.measurement
    network, metric = measurement.network, measurement.observation.metric
    if not network.weight_only:
        return 0.0
    widths = list(zip(network.weight_only, allocation.weight_only_bits, strict=True))
    model = with_outputs(with_weight_only(network.model, widths), metric.outputs)
    session = reference.runtime.session(model, "all")
    errors = (metric.errors(session.run(b.feeds, metric.outputs), b.aimed, b.count) for b in reference.batches())
    return float(sum(e.sum() for e in errors)) / len(reference.samples)
