"""The factors that decode the integers of a weight, where its inputs stay in float.

    a scale for each channel    [units], in the form that a Mul broadcasts over the weight
    a scale for each block      [units, B] ─ Gather ─ one for each weight

The Gather reads the number of each weight's block, of the weight's shape without its channel axis. Layers of the same
shape share the numbers, which take a byte each, and a Cast to a type that Gather has. All of it is constant.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.model.surgeon import Graph, Tensor


@dataclass(frozen=True)
class BlockNumbers:
    """Adds the factors to `graph`. known: the numbers of blocks by the weight's other axes and their count."""

    graph: Graph
    known: dict[tuple[tuple[int, ...], int], Tensor] = field(default_factory=dict)

    def scales(self, linear: Linear, scales: NDArray[np.float32], stem: str) -> Tensor:
        """Return the factors of a layer's integers, from its `scales` [units] or [units, B]."""
        name = surgeon.fresh(self.graph, stem)
        if scales.ndim == 1:
            rest = len(linear.shape) - linear.axis - 1
            return surgeon.constant(name, scales.reshape(-1, *[1] * rest))
        first = linear.axis == 0
        stored = surgeon.constant(name, np.ascontiguousarray(scales if first else scales.T))
        inputs = [stored, self._numbers(linear, scales.shape[1])]
        return surgeon.append(self.graph, "Gather", inputs, f"{stem}_Gather", attrs={"axis": int(first)})

    def _numbers(self, linear: Linear, count: int) -> Tensor:
        shape = tuple(n for k, n in enumerate(linear.shape) if k != linear.axis)
        if (shape, count) not in self.known:
            numbers = np.arange(np.prod(shape)) // (np.prod(shape) // count)
            small = numbers.astype(np.min_scalar_type(count - 1)).reshape(shape)
            stored = surgeon.constant(surgeon.fresh(self.graph, "block_numbers"), small)
            cast = surgeon.append(self.graph, "Cast", [stored], "block_numbers_Cast", attrs={"to": TensorProto.INT32})
            self.known[shape, count] = cast
        return self.known[shape, count]
