"""Ridge regression of weights on the inputs that they have in the quantized network, before these weights are rounded.

With x and x' the inputs of a layer in the float and the quantized network, its outputs are y = W x, and

    W' = argmin E‖y - W' x'‖² + λ ‖W' - W‖²,    W' = W + Cov(y - W x', x') (Cov(x') + λ I)⁻¹,

where the bias accounts for the means (ERQ, Zhong et al., ICML 2024). λ is a share of the mean variance of x'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.moments import thinned
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.system.runtime import Runtime

Array = NDArray[Any]
Float = NDArray[np.float64]

PENALTY = 0.3  # λ, as a share of the mean variance of the inputs


@dataclass(frozen=True)
class Regression:
    """Layers of the float network `model`, the same with inputs in the `quantized` one, and their weights as rows."""

    model: onnx.ModelProto
    quantized: onnx.ModelProto
    layers: Sequence[tuple[Layer, Layer, Array]]

    def rows(self, samples: Samples, batch: int, runtime: Runtime) -> list[Array]:
        """Return the W' of each layer, [units, weights of a unit]."""
        sums = [_Sums.of(layer, rows) for layer, _, rows in self.layers]
        outputs = [use.output for layer, _, _ in self.layers for use in layer.uses]
        inputs = [use.data for _, layer, _ in self.layers for use in layer.uses]
        floats, quantized = (
            runtime.session(with_outputs(model, list(dict.fromkeys(names))), "all")
            for model, names in ((self.model, outputs), (self.quantized, inputs))
        )
        for count, feeds in samples.counted_batches(batch):
            y: Mapping[str, Array] = dict(zip(dict.fromkeys(outputs), floats.run(feeds), strict=True))
            x: Mapping[str, Array] = dict(zip(dict.fromkeys(inputs), quantized.run(feeds), strict=True))
            for (before, after, _), each in zip(self.layers, sums, strict=True):
                for use, other in zip(before.uses, after.uses, strict=True):
                    each.add(use.linear.outputs(y[use.output], count), other.linear.unfold(x[other.data], count))
        return [
            layer.linear.ungrouped(layer.linear.grouped(rows) + each.step())
            for (layer, _, rows), each in zip(self.layers, sums, strict=True)
        ]


@dataclass
class _Sums:
    """Sums over vectors x' [G, K] and errors e = y - W x' [G, O] of a layer."""

    weight: Array
    count: int
    x: Float
    e: Float
    xx: Float
    ex: Float

    @classmethod
    def of(cls, layer: Layer, rows: Array) -> "_Sums":
        weight = layer.linear.grouped(rows)
        group, outputs, inputs = weight.shape
        shapes = (group, inputs), (group, outputs), (group, inputs, inputs), (group, outputs, inputs)
        return cls(weight, 0, *(np.zeros(shape) for shape in shapes))

    def add(self, outputs: Array, inputs: Array) -> None:
        """Add outputs [samples, G, O, P] and inputs [samples, G, K, P]."""
        kept = thinned(inputs)
        y, x = (np.moveaxis(v[..., kept], 0, 2).reshape(*v.shape[1:3], -1) for v in (outputs, inputs))
        e = y - self.weight @ x
        self.count += x.shape[-1]
        self.x += x.sum(axis=2, dtype=np.float64)
        self.e += e.sum(axis=2, dtype=np.float64)
        self.xx += x @ x.swapaxes(1, 2)
        self.ex += e @ x.swapaxes(1, 2)

    def step(self) -> Float:
        """Return W' - W, [G, O, K]."""
        x, e = self.x / self.count, self.e / self.count
        covariance = self.xx / self.count - x[:, :, None] * x[:, None]
        cross = self.ex / self.count - e[:, :, None] * x[:, None]
        index = np.arange(covariance.shape[-1])
        penalty = PENALTY * covariance[:, index, index].mean(axis=1, keepdims=True)
        covariance[:, index, index] += np.maximum(penalty, 1e-30)
        return np.linalg.solve(covariance, cross.swapaxes(1, 2)).swapaxes(1, 2).astype(np.float64)
