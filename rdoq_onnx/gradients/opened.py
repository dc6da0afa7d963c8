"""Fused operators written out in the graph to differentiate, so that only standard operators need adjoint rules.

The emitted model keeps them. What they compute depends on their feeds (lengths of samples in a padded batch, caches in
a shared buffer), so the graph is only taken if it gives the same outputs for the batch at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.errors import ModelError
from rdoq_onnx.observation.batching import close
from rdoq_onnx.passes.unfusing.unfuse import Unfuse

Array = NDArray[Any]
Run = Callable[[onnx.ModelProto, Mapping[str, Array], Sequence[str]], Sequence[Array]]


def opened(model: onnx.ModelProto, outputs: Sequence[str], feeds: Mapping[str, Array], run: Run) -> onnx.ModelProto:
    """Return `model`, of fixed input sizes, with its fused operators written out; as it is if `outputs` differ then."""
    result = Unfuse(closed=True)(model)
    if result is model:
        return model
    try:
        pairs = zip(run(model, feeds, outputs), run(result, feeds, outputs), strict=True)
        return (
            result
            if all(np.shape(a) == np.shape(b) and close(np.asarray(a), np.asarray(b)) for a, b in pairs)
            else model
        )
    except ModelError:
        return model
