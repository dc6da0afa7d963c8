"""Values of graphsurgeon's constants, read from their TensorProto when they are asked for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from rdoq_onnx.model import external


class Stored(LazyValues):  # type: ignore[misc]
    """The values of a TensorProto, mapped if they are in a file."""

    def load(self) -> NDArray[Any]:
        array = external.values(self.tensor)
        return array if external.Place.of(self.tensor) else np.array(array)
