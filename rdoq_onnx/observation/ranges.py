"""Least and greatest values of tensors over samples, and how far beyond them a range may go.

The graph that makes the tensors finds their ends as well: numpy would take longer, and a GPU would send every tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.model.protos import default_opset

Array = NDArray[Any]

_SURE = 32  # samples that show well enough where the ends of a range are
_AXES = "ends/axes"
_ENDS = ("ReduceMin", "ReduceMax", "ReduceSum")  # the sum is finite if all values are


def with_ends(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` that gives the ends and the sum of each of `tensors` as well, over all axes but the first."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, opset = copy.graph, default_opset(model)
    graph.initializer.append(numpy_helper.from_array(np.array([1]), _AXES))
    for tensor in tensors:
        rows = f"ends/rows/{tensor}"
        graph.node.append(helper.make_node("Flatten", [tensor], [rows], rows, axis=1))
        for kind in _ENDS:
            name = f"ends/{kind}/{tensor}"
            graph.node.append(_reduced(kind, rows, name, opset))
            graph.output.append(onnx.ValueInfoProto(name=name))
    return copy


def _reduced(kind: str, rows: str, name: str, opset: int) -> onnx.NodeProto:
    """Over axis 1."""
    if kind != "ReduceSum" and opset < 18:
        return helper.make_node(kind, [rows], [name], name, axes=[1])
    return helper.make_node(kind, [rows, _AXES], [name], name)


def ends_of(tensor: str, values: Mapping[str, Array], count: int) -> NDArray[np.float64]:
    """Least and greatest value of each of `count` samples, [2, count], from what `with_ends` makes a model give.

    Raises CalibrationError if `tensor` is not finite.
    """
    low, high, total = (values[f"ends/{kind}/{tensor}"].reshape(count, -1) for kind in _ENDS)
    if not np.isfinite(total).all():
        raise CalibrationError(f"tensor {tensor!r} of the float model is not finite on the samples given")
    return np.stack([low.min(axis=1), high.max(axis=1)]).astype(np.float64)


def margin(samples: int) -> float:
    """The share that a range seen on `samples` samples is widened by on either side, at most.

    One more sample goes beyond n others with probability 1 / (n + 1), and the fewer there are, the further.
    """
    return max(0.0, 2 / samples - 2 / _SURE)


def widened(ends: NDArray[np.float64], share: float) -> tuple[float, float]:
    """The range of all samples [2, samples] with a margin, which is no wider than samples differ.

    An end that several agree on gets none: it is a bound, as that of a Relu.
    """
    return -_beyond(-ends[0], share), _beyond(ends[1], share)


def _beyond(ends: NDArray[np.float64], share: float) -> float:
    """The greatest of `ends`, one for each sample, and a margin."""
    greatest = ends.max()
    if greatest <= 0 or np.count_nonzero(ends == greatest) > 1:
        return float(greatest)
    return float(greatest + min(share * greatest, greatest - ends.min()))
