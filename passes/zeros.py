"""Zero points of zeros, one for all DequantizeLinear of a type and length; for the passes that add them."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph


@dataclass(frozen=True)
class Zeros:
    """Initializers of `graph` that hold nothing but zeros."""

    graph: Graph
    made: dict[tuple[str, int], Constant] = field(default_factory=dict)

    def like(self, integers: NDArray[np.integer], length: int) -> Constant:
        """`length` zeros of the type of `integers`."""
        key = (integers.dtype.name, length)
        if key not in self.made:
            zeros = np.zeros(length, integers.dtype)
            self.made[key] = surgeon.constant(surgeon.fresh(self.graph, "zero_points"), zeros)
        return self.made[key]
