"""Measure how well additivity holds (Eq. 6, supplement): δ of each layer and activation alone.

The sum of these exact δ lies between the predicted sum of first-order curves and the distortion of the emitted model,
where everything is quantized at once: it separates the error of the curves from that of adding them up.
"""

from dataclasses import dataclass, replace

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.quantized_model import mixed
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.progress import Advance, Progress
from rdoq_onnx.system.runtime import Runtime

SAMPLES = (4, 32)  # minimum and maximum number of samples
_WORK = 3e10  # bound on the elements computed; large networks get fewer samples


@dataclass(frozen=True)
class Alone:
    """Exact δ (Eq. 7, 8) of each layer and activation at its widths, all else in float, on `samples` samples."""

    layers: tuple[float, ...]
    activations: tuple[float, ...]
    samples: int


def measure_alone(allocation: Allocation, prober: Prober, advance: Advance) -> Alone:
    """Measure each layer and activation of `allocation` by itself; `advance(1)` after each."""
    measurement = allocation.measurement
    layers, activations = [], []
    for layer, bits in zip(measurement.layers, allocation.layer_bits, strict=True):
        layers.append(float(prober.whole_layer(layer.layer, [mixed(layer.codes, bits)], layer.mean)[0]))
        advance(1)
    for each, width in zip(measurement.activations, allocation.activation_bits, strict=True):
        activations.append(float(prober.activation(each.activation, [each.quantizers[width]])[0]))
        advance(1)
    return Alone(tuple(layers), tuple(activations), len(prober.samples))


def affordable(allocation: Allocation) -> int:
    """Return the number of samples to measure on."""
    measurement = allocation.measurement
    units = len(allocation.layer_bits) + len(allocation.activation_bits)
    work = units * sum(measurement.observation.sizes.values())  # of one sample
    return min(max(int(_WORK / max(work, 1)), SAMPLES[0]), SAMPLES[1])


def measured_alone(
    allocation: Allocation, measurement: Measurement, held_out: Samples, runtime: Runtime, progress: Progress
) -> Alone:
    """Measure δ of each layer and activation by itself, at the widths of `allocation`, quantized as in `measurement`.

    `measurement` has the scales and biases from before refinement, which fits them to the errors of the layers in
    front; a layer quantized alone has no such errors in its input.
    """
    unrefined = replace(allocation, measurement=measurement)
    observation = measurement.observation
    samples = held_out.some(affordable(unrefined))
    prober = Prober(measurement.aimed, samples, observation.metric, runtime, observation.batching)
    with progress.step("additivity", len(allocation.layer_bits) + len(allocation.activation_bits)) as advance:
        return measure_alone(unrefined, prober, advance)
