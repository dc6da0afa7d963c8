"""Follow the channels of a tensor through operators that move or scale its values.

The labels of a tensor are an array that broadcasts to it and names the channel of each element; -1 is none.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from rdoq_onnx.model.graph import attribute

Labels = NDArray[np.int64]
Shapes = Mapping[str, tuple[int, ...]]

_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_POINTWISE = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity"})  # f(r·x) = r·f(x) for r > 0


def collapsed(labels: Labels) -> Labels:
    """Reduce each axis along which the labels are all equal to one element."""
    for axis in range(labels.ndim):
        first = labels.take([0], axis)
        if (labels == first).all():
            labels = first
    return labels


def of_rank(labels: Labels, rank: int) -> Labels:
    """Add leading axes of one element up to `rank`."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def distinct(labels: Labels) -> bool:
    """Whether each channel has one element: a batch axis that was merged with another would repeat it."""
    real = labels[labels >= 0]
    return len(np.unique(real)) == real.size


def fits(labels: Labels, shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape has all the axes of `labels`."""
    if labels.ndim > len(shape):
        return all(n == 1 for n in labels.shape[: labels.ndim - len(shape)]) and fits(labels[0], shape)
    return all(a in (1, b) for a, b in zip(labels.shape[::-1], shape[::-1], strict=False))


def upstream(node: NodeProto, output: str, labels: Labels, shapes: Shapes) -> Labels | None:
    """Return the labels of the first input of `node` from those of `output`; None if channels do not pass."""
    source, target = shapes.get(node.input[0]), shapes.get(output)
    if source is None or target is None:
        return None
    if node.op_type == "Split":
        return _unsplit(node, output, labels, shapes)
    return _moved(node, labels, target, source, inverse=True)


def downstream(node: NodeProto, labels: Labels, shapes: Shapes) -> Labels | None:
    """Return the labels of the output of `node` from those of its first input; None if channels do not pass."""
    source, target = shapes.get(node.input[0]), shapes.get(node.output[0])
    if source is None or target is None or len(node.output) > 1:
        return None
    return _moved(node, labels, source, target, inverse=False)


def _moved(
    node: NodeProto, labels: Labels, source: Sequence[int], target: Sequence[int], *, inverse: bool
) -> Labels | None:
    """Move labels of a tensor of shape `source` to one of shape `target`, through `node` or against it."""
    if node.op_type in _POINTWISE:
        return labels
    if node.op_type in _POOLS:
        spatial = of_rank(labels, len(source)).shape[2:]
        return labels if all(n == 1 for n in spatial) and len(node.output) == 1 else None
    if node.op_type == "Transpose":
        order = list(attribute(node, "perm", range(len(source))[::-1]))
        return of_rank(labels, len(source)).transpose(np.argsort(order) if inverse else order)
    if node.op_type in _RESHAPES and 0 not in (*source, *target):
        return collapsed(np.broadcast_to(labels, source).reshape(target))
    return None


def _unsplit(node: NodeProto, output: str, labels: Labels, shapes: Shapes) -> Labels:
    """Label the input of a Split; the parts beside `output` are in no channel."""
    rank, axis = len(shapes[output]), attribute(node, "axis", 0)
    full = list(of_rank(labels, rank).shape)
    parts = []
    for name in node.output:
        full[axis] = shapes[name][axis]
        parts.append(np.broadcast_to(labels, full) if name == output else np.full(full, -1))
    return np.concatenate(parts, axis)
