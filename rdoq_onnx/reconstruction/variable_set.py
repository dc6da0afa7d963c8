"""All variables of an allocation, and the allocation that they stand for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.candidates.candidates import integer_limit
from rdoq_onnx.candidates.quantizer import block_window, window
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.curves.measurement import MeasuredLayer
from rdoq_onnx.emission.quantized_model import bias_shift, chosen_weights
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.reconstruction.parametrized import Parametrized
from rdoq_onnx.reconstruction.variables import Bias, Floats, Kind, Quantizer, Variable, Weight

Array = NDArray[Any]


@dataclass(frozen=True)
class VariableSet:
    """The variables of `allocation`, by the index of their layer or activation.

    shifts: of each tuned weight's layer, what the allocation adds to its outputs.
    """

    allocation: Allocation
    weights: Mapping[int, Weight]
    biases: Mapping[int, Bias]
    quantizers: Mapping[int, Quantizer]
    shifts: Mapping[int, NDArray[np.float64]]

    @classmethod
    def of(cls, allocation: Allocation, graph: Parametrized, spreads: Mapping[int, float]) -> "VariableSet":
        """Start at `allocation`; spreads: σ of the outputs of each layer with a bias."""
        measurement = allocation.measurement
        limit, weights, shifts = integer_limit(measurement.network), {}, {}
        for k, (layer, codes, shift) in enumerate(chosen_weights(allocation)):
            if k in graph.sites:
                rows = measurement.network.rows(layer)
                bounds = _windows(rows, codes, allocation.layer_bits[k], limit)
                weights[k], shifts[k] = Weight.of(graph.sites[k], rows, codes, bounds), shift
        biases = {k: Bias(name, b, spreads[k], np.zeros_like(b)) for k, (name, b) in graph.biases.items()}
        quantizers = {}
        pairs = zip(measurement.activations, allocation.activation_bits, strict=True)
        for k, (each, bits) in enumerate(pairs):
            now, reach = each.quantizers[bits], measurement.observation.reach(each.activation.tensor)[1]
            zero = np.full(1, now.zero_point, np.float32)
            quantizers[k] = Quantizer(
                graph.scales[k], graph.zeros.get(k, ""), now, reach, np.zeros(1, np.float32), zero
            )
        return cls(allocation, weights, biases, quantizers, shifts)

    @property
    def arrays(self) -> list[tuple[Kind, Floats]]:
        """All arrays to optimize, each with its kind."""
        return [pair for variable in self._all() for pair in variable.arrays.items()]

    def feeds(self) -> dict[str, Floats]:
        """Return the inputs of the parametrized graph."""
        return {name: value for variable in self._all() for name, value in variable.feeds().items()}

    def gradients(self, found: Mapping[str, Array]) -> list[Floats]:
        """Return the gradients of `arrays` from the adjoints of the inputs."""
        return [gradient for variable in self._all() for gradient in variable.gradients(found)]

    def confine(self, pull: float = 0.0) -> None:
        """Keep all variables within their bounds, and pull weights by a share of the way to their codes."""
        for variable in self._all():
            variable.confine(pull)

    def values(self) -> tuple[Floats, ...]:
        """Return copies of all arrays."""
        return tuple(array.copy() for _, array in self.arrays)

    def restore(self, values: Sequence[Floats]) -> None:
        """Set all arrays to `values`."""
        for (_, array), value in zip(self.arrays, values, strict=True):
            array[...] = value

    def tuned(self) -> Allocation:
        """Return the allocation with what the variables stand for."""
        measurement = self.allocation.measurement
        layers: list[MeasuredLayer] = list(measurement.layers)
        for k in self.weights:
            layers[k] = self._layer(k)
        result = replace(self.allocation, measurement=replace(measurement, layers=tuple(layers)))
        for k, quantizer in self.quantizers.items():
            result = result.with_quantizer(k, quantizer.affine)
        return result

    def _layer(self, k: int) -> MeasuredLayer:
        before, codes = self.allocation.measurement.layers[k], self.weights[k].codes
        bits = self.allocation.layer_bits[k]
        layer, used = before.layer, np.unique(bits).tolist()
        if isinstance(before.codes, SpooledCodes):
            table: Mapping[int, WeightCodes] = dict.fromkeys(used, codes)
        else:
            table = {**before.codes, **{b: before.codes[b].replaced(codes, bits == b) for b in used}}
        if layer.linear.axes:
            return replace(before, codes=table)
        total = self.shifts[k] + (self.biases[k].change.reshape(-1) if k in self.biases else 0.0)
        change = codes.change(self.allocation.measurement.network.rows(layer))
        return replace(before, codes=table, offset=total - bias_shift(layer, change, before.mean))

    def _all(self) -> Iterator[Variable]:
        yield from self.weights.values()
        yield from self.biases.values()
        yield from self.quantizers.values()


def _windows(rows: Floats, codes: WeightCodes, bits: NDArray[np.int64], limit: int) -> tuple[Floats, Floats]:
    """Return the least and greatest integer of each unit at its width, [units, 1].

    A unit on a grid of its own may have integers outside the window of its weights; then theirs bound it.
    """
    low, high = (np.zeros(len(bits)) for _ in range(2))
    for width in np.unique(bits[bits > 0]).tolist():
        own = bits == width
        bounds = block_window(width, limit) if codes.scales.ndim == 2 else window(rows[own], width, limit)
        low[own], high[own] = bounds
    least, greatest = codes.integers.min(axis=1), codes.integers.max(axis=1)
    outside = (least < low) | (greatest > high)
    low[outside], high[outside] = least[outside], greatest[outside]
    return low[:, None].astype(np.float32), high[:, None].astype(np.float32)
