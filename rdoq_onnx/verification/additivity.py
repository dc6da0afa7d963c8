"""How well additivity holds (Eq. 6 and the supplement's check of it): δ of each layer and activation alone.

The sum of these exact δ stands between the predicted sum, of first-order curves, and the distortion of the emitted
model, where everything is quantized at once: it tells an error of the curves from one of adding them up.
"""

from dataclasses import dataclass, replace

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.quantized_model import mixed
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.progress import Advance, Progress
from rdoq_onnx.system.runtime import Runtime

SAMPLES = (4, 32)  # on at least and at most so many
_WORK = 3e10  # elements that the check may compute; large networks get fewer samples


@dataclass(frozen=True)
class Alone:
    """δ (Eq. 7, 8) measured of each layer and each activation at its widths, all else in float, on `samples`."""

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
    """How many samples to measure on."""
    measurement = allocation.measurement
    units = len(allocation.layer_bits) + len(allocation.activation_bits)
    work = units * sum(measurement.observation.sizes.values())  # of one sample
    return min(max(int(_WORK / work), SAMPLES[0]), SAMPLES[1])


def measured_alone(
    allocation: Allocation, measurement: Measurement, held_out: Samples, runtime: Runtime, progress: Progress
) -> Alone:
    """δ of each layer and activation by itself, at the widths of `allocation`, as `measurement` describes them.

    The second look has fitted scales and biases to what the layers in front do wrong; by itself a layer has no such
    inputs.
    """
    described = replace(allocation, measurement=measurement)
    observation = measurement.observation
    samples = held_out.some(affordable(described))
    prober = Prober(measurement.aimed, samples, observation.metric, runtime, observation.batching)
    with progress.step("additivity", len(allocation.layer_bits) + len(allocation.activation_bits)) as advance:
        return measure_alone(described, prober, advance)
