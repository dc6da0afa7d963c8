"""Least and greatest values of tensors over samples, and margins beyond them.

The reductions run inside the graph: numpy would take longer, and a GPU would have to transfer every tensor.
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

_ENOUGH_SAMPLES = 32  # for ranges without a margin
_QUIET = 32  # a sample is quiet if its values fill less than 1 / _QUIET of the range: 8 of 256 steps
_RARE = 64  # and quiet samples count if there is one in _RARE
_AXES = "ends/axes"
_ENDS = ("ReduceMin", "ReduceMax", "ReduceSum")  # the sum is finite only if all values are


def with_ends(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of `model` that also outputs min, max and sum of each of `tensors` over all axes but the first."""
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
    """Reduce over axis 1, in the form of the opset."""
    if kind != "ReduceSum" and opset < 18:
        return helper.make_node(kind, [rows], [name], name, axes=[1])
    return helper.make_node(kind, [rows, _AXES], [name], name)


def ends_of(tensor: str, values: Mapping[str, Array], count: int) -> NDArray[np.float64]:
    """Return the least and greatest value of each of `count` samples, [2, count], from the outputs of `with_ends`.

    Raises CalibrationError if `tensor` is not finite.
    """
    low, high, total = (values[f"ends/{kind}/{tensor}"].reshape(count, -1) for kind in _ENDS)
    if not np.isfinite(total).all():
        raise CalibrationError(
            f"tensor {tensor!r} of the float model is not finite on the given samples; "
            "check them, and use a large finite value in masks"
        )
    return np.stack([low.min(axis=1), high.max(axis=1)]).astype(np.float64)


def margin(samples: int) -> float:
    """Return the largest share by which to widen either side of a range observed on `samples` samples.

    A new sample exceeds n others with probability 1 / (n + 1), and by more the fewer there are.
    """
    return max(0.0, 2 / samples - 2 / _ENOUGH_SAMPLES)


def widened(ends: NDArray[np.float64], share: float) -> tuple[float, float]:
    """Return the range over all samples from `ends` [2, samples], with margins no larger than the samples' spread.

    An end that several samples share gets no margin: it is a bound, like 0 behind a Relu.
    """
    return -_beyond(-ends[0], share), _beyond(ends[1], share)


def has_quiet_samples(ends: NDArray[np.float64]) -> bool:
    """Whether one scale for all samples, whose `ends` are [2, samples], is too coarse for some of them.

    A sample of zeros alone is none of them.
    """
    span = max(float(ends[1].max()), 0.0) - min(float(ends[0].min()), 0.0)
    peaks = np.abs(ends).max(axis=0)
    return bool(np.mean((peaks > 0) & (peaks < span / _QUIET)) >= 1 / _RARE)


def _beyond(ends: NDArray[np.float64], share: float) -> float:
    """Return the greatest of `ends` [samples], plus a margin."""
    greatest = ends.max()
    if greatest <= 0 or np.count_nonzero(ends == greatest) > 1:
        return float(greatest)
    return float(greatest + min(share * greatest, greatest - ends.min()))
