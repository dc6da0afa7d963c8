"""The width of every channel and activation, and the distortion predicted for it."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.model.codes import Affine


@dataclass(frozen=True)
class Allocation:
    """The width of everything quantized.

    layer_bits: for each layer and stored weight, the width of each channel. activation_bits: that of each activation.
    predicted: sum of all δ, by additivity (Eq. 6) the distortion of the whole network. gap: maximum relative distance
    from the optimum of the curves.
    """

    measurement: Measurement
    layer_bits: tuple[NDArray[np.int64], ...]
    activation_bits: tuple[int, ...]
    predicted: float
    gap: float

    def __repr__(self) -> str:
        average = self.activation_average
        activations = "float" if average is None else f"{average:.2f} bits"
        return f"Allocation(weights {self.weight_average:.2f} bits, activations {activations}, δ {self.predicted:.3g})"

    def with_quantizer(self, k: int, quantizer: Affine) -> "Allocation":
        """Return the same with another quantizer of activation `k` at its width."""
        activations = list(self.measurement.activations)
        quantizers = {**activations[k].quantizers, self.activation_bits[k]: quantizer}
        activations[k] = replace(activations[k], quantizers=quantizers)
        return replace(self, measurement=replace(self.measurement, activations=tuple(activations)))

    @property
    def weight_average(self) -> float:
        """Return the bits per weight over all searched weights; 0 if there are none."""
        channels = self.measurement.channels
        return float(self.weight_payload / max(self.measurement.curves.elements[:channels].sum(), 1))

    @property
    def weight_payload(self) -> int:
        """Return the bits of all searched weights, with those of scales of blocks."""
        return int(self.spent[: self.measurement.channels].sum())

    @property
    def spent(self) -> NDArray[np.int64]:
        """Return the bits that each row of the curves takes at its width."""
        return self.measurement.curves.spent(self.bits)

    @property
    def activation_average(self) -> float | None:
        """Return the bits per element of the activations that feed layers; None if none is quantized."""
        feeding = np.array([not a.fusion for a in self.measurement.network.activations], bool)
        if not feeding.any():
            return None
        elements = self.measurement.curves.elements[self.measurement.channels :]
        return _average(np.array(self.activation_bits)[feeding], elements[feeding])

    @property
    def joint_average(self) -> float:
        """Return the bits per element of weights and activations that feed layers, together."""
        counted = [True] * self.measurement.channels + [not a.fusion for a in self.measurement.network.activations]
        return _average(self.bits[counted], self.measurement.curves.elements[counted])

    @property
    def bits(self) -> NDArray[np.int64]:
        """Return the width of each row of the curves: all channels, then all activations."""
        return np.concatenate([*self.layer_bits, np.array(self.activation_bits, np.int64)])

    @property
    def bound(self) -> float:
        """Return the lower bound on the predicted distortion of any widths within the budgets."""
        return self.predicted * (1 - self.gap)

    @property
    def distortions(self) -> NDArray[np.float64]:
        """Return the predicted δ of each row of the curves at its width."""
        bits = self.bits
        return self.measurement.curves.distortion[np.arange(len(bits)), bits]


def _average(bits: NDArray[np.int64], elements: NDArray[np.int64]) -> float:
    return float((bits * elements).sum() / max(elements.sum(), 1))
