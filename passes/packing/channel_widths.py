"""INT8 weights of a model, and how many bits each of their channels needs; for pack_weights.py.

A channel's window is the 2^b integers from l = -2^(b-1) + h on, h 0 or 1; at b = 0 all are 0, at b = 8 h is 0. b is the
least whose window holds the channel, h the least at that b: nothing but the integers decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from rdoq_onnx.model import external

MAX_BITS = 8
Neighbours = tuple[dict[str, NodeProto], dict[str, NodeProto]]  # by tensor, what reads and what makes it


@dataclass(frozen=True, eq=False)
class Weight:
    """integers: int8 in the weight's shape; axis: of its channels; bits, shift: b and h of each channel, uint8 [C]."""

    name: str
    integers: NDArray[np.int8]
    axis: int
    bits: NDArray[np.uint8]
    shift: NDArray[np.uint8]

    @property
    def channels_first(self) -> NDArray[np.int8]:
        return np.moveaxis(self.integers, self.axis, 0)

    @property
    def rows(self) -> NDArray[np.int8]:
        """The elements of each channel, [C, K]."""
        return _rows(self.integers, self.axis)


def read_weights(model: ModelProto, names: Sequence[str]) -> list[Weight]:
    """The initializers of these names that have elements, each once.

    The channel axis is that of the DequantizeLinear that reads a weight, or the first of the scales that multiply its
    Cast; where a Gather spreads scales of blocks, the one that it does not.
    """
    tensors = {t.name: t for t in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    makers = {name: node for node in model.graph.node for name in node.output}
    result = []
    for name in dict.fromkeys(names):
        integers = external.values(tensors[name])
        if integers.size and integers.ndim:
            axis = _axis(name, integers.ndim, (readers, makers), tensors)
            result.append(Weight(name, integers, axis, *widths_of(_rows(integers, axis))))
    return result


def _rows(integers: NDArray[np.int8], axis: int) -> NDArray[np.int8]:
    return np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1)


def _axis(name: str, rank: int, nodes: Neighbours, tensors: dict[str, TensorProto]) -> int:
    readers, makers = nodes
    reader = readers.get(name)
    if reader is not None and reader.op_type == "DequantizeLinear":
        given = next((a.i for a in reader.attribute if a.name == "axis"), 1)
        return given % rank if -rank <= given < rank else 0
    while reader is not None and reader.op_type == "Cast":
        reader = readers.get(reader.output[0])
    if reader is None or reader.op_type != "Mul":
        return 0
    scales = [tensors[i] for i in reader.input if i in tensors]
    gathered = [makers[i] for i in reader.input if i in makers and makers[i].op_type == "Gather"]
    if gathered:  # scales of blocks, [channels, B] where the channels come first, else [B, channels]
        return 0 if any(a.name == "axis" and a.i == 1 for a in gathered[0].attribute) else rank - 1
    return max(rank - len(scales[0].dims), 0) % rank if scales else 0


def widths_of(rows: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """b and h of each row."""
    least, greatest = rows.min(axis=1).astype(np.int16), rows.max(axis=1).astype(np.int16)
    bits, shift = np.full(len(rows), MAX_BITS, np.uint8), np.zeros(len(rows), np.uint8)
    for b in range(MAX_BITS - 1, -1, -1):
        for h in (1, 0) if b else (0,):
            low = h - ((1 << b) >> 1)
            fits = (least >= low) & (greatest < low + (1 << b))
            bits[fits], shift[fits] = b, h
    return bits, shift
