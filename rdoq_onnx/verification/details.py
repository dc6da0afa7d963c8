"""What the HTML report shows of a run beside its figures: measured for that page only."""

from dataclasses import dataclass

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.verification.additivity import Alone, measured_alone
from rdoq_onnx.verification.value_ranges import ValueRanges, value_ranges


@dataclass(frozen=True)
class Details:
    """alone: δ of each layer and activation by itself. ranges: of values."""

    alone: Alone
    ranges: ValueRanges


def measured_details(
    allocation: Allocation, reference: Reference, unrefined: Measurement, progress: Progress
) -> Details:
    """Measure the details of `allocation` on the held-out samples; `unrefined`: see `measured_alone`."""
    alone = measured_alone(allocation, unrefined, reference.samples, reference.runtime, progress)
    return Details(alone, value_ranges(allocation))
