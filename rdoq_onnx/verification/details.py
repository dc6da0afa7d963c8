"""What the HTML report shows of a run beside its figures: measured for that page only."""

from dataclasses import dataclass

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.verification.additivity import Alone, measured_alone
from rdoq_onnx.verification.layer_outputs import LayerOutputs, compare_layers
from rdoq_onnx.verification.value_ranges import ValueRanges, value_ranges


@dataclass(frozen=True)
class Details:
    """alone: δ of each layer and activation by itself. outputs: the SQNR of each layer's output. ranges: of values."""

    alone: Alone
    outputs: LayerOutputs
    ranges: ValueRanges


def measured_details(
    emission: Emission, allocation: Allocation, reference: Reference, unrefined: Measurement, progress: Progress
) -> Details:
    """Measure the details of an emitted model on the held-out samples; `unrefined`: see `measured_alone`."""
    held_out, runtime = reference.samples, reference.runtime
    alone = measured_alone(allocation, unrefined, held_out, runtime, progress)
    with progress.step("layer outputs"):
        outputs = compare_layers(emission, allocation.measurement, held_out, runtime)
    return Details(alone, outputs, value_ranges(allocation))
