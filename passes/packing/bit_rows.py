"""Weights at exactly the bits of their channels: "packed" storage, see pack_weights.py.

FORMAT, for all weights of a model together:

1. A channel has K integers q of b bits from a window with h 0 or 1 (channel_widths.py). Stored is q where h = 0 and -q
   where h = 1, which both lie in -2^(b-1) .. 2^(b-1) - 1, in two's complement: a sign costs the decode nothing, an
   offset an addition.
2. A UINT8 for each channel holds 2b + h. It is all that the decode needs to know, and one byte.
3. The b bits of its integers are b rows of K bits, the least significant first. Rows are what Gather copies as blocks
   of memory; picking elements one by one takes ten times as long.
4. Channels follow each other without a gap, in their order. Weights that differ in nothing but their channels make a
   group; groups stand by rising K. Each is decoded by nodes of its own, as what these work on are rows of one length.
5. Eight rows of a group, one after the other, are a row of K bytes, the first in bit 0: a shift moves a whole row of
   integers at once, and a channel lies in two neighbouring rows of bytes at most, whatever its width.
6. A group's last row of bytes is filled up by zeros. So that the next begins with a new row, the codes of a group end
   with one more, whose b is what was filled up. A group has two rows of bytes at least.

The decode numbers the rows of bits by a CumSum over the widths: a channel begins in bit p of row r of bytes. Gather
fetches rows r and r + 1, counted from the group's end: the row behind the last is then the first, and not missing. With
p + b <= 8 the channel is in row r alone, else it goes on in the next, and the two shifts

    first row    >> p, << 8 - b        second row    << 16 - b - p, which is nothing where that is 8 or more

bring its bits to the upper end of the bytes and leave nothing else. Read as INT8, the two add up to q 2^(8-b).
QLinearMatMul multiplies both by 2^(b-1), or -2^(b-1) where h = 1, adds them and divides by 2^7, exactly: its INT8
operands are at most 128 and two products are added. What it multiplies by has a zero point of -1, for 128 to be there.

ONNX Runtime keeps all results of folding until it has folded all, and copies the inputs of each node: their size is
most of the time and memory that loading takes, here 11 bytes an element. All operators are of opset 13, in types that
ONNX Runtime 1.20 has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from rdoq_onnx.model.surgeon import Graph, Tensor
from rdoq_onnx.passes.packing.channel_widths import MAX_BITS, Weight
from rdoq_onnx.passes.packing.decoding import Decoding

# Elements decoded together, unless one weight has more: memory of this size goes back to the system when it is freed.
_TOGETHER = 2**24
# Bytes of the nodes that decode a group, and of those that all groups share: what saves less stays INT8.
_GROUP_NODES = 350
_SHARED_NODES = 650
# What each code 2b + h is multiplied by, less 1 for the zero point.
_FACTORS = np.array([(1 - 2 * h) * (2**b >> 1) - 1 for b in range(MAX_BITS + 1) for h in (0, 1)][:-1], np.int8)


@dataclass(frozen=True)
class _Group:
    """codes: uint8 [C + 1], see 6; rows: of bytes, uint8 [., K]."""

    weights: list[Weight]
    codes: NDArray[np.uint8]
    rows: NDArray[np.uint8]

    @property
    def sizes(self) -> list[int]:
        return [len(w.bits) for w in self.weights]

    @property
    def saved(self) -> int:
        """Bytes of the file."""
        return sum(w.integers.size for w in self.weights) - self.rows.nbytes - self.codes.nbytes - _GROUP_NODES


def store_rows(graph: Graph, weights: Sequence[Weight]) -> None:
    """Replace the initializers of `weights` by stored rows and nodes that decode them, where that is smaller."""
    groups = [group for members in _members(weights) if (group := _group(members)).saved > 0]
    if sum(group.saved for group in groups) <= _SHARED_NODES * bool(groups):
        return
    tensors, decoding = graph.tensors(), Decoding(graph)
    for group, decoded in zip(groups, _decode(decoding, groups), strict=True):
        shape = group.weights[0].channels_first.shape[1:]
        parts = decoding.split(decoding.reshape(decoded, [-1, *shape]), group.sizes)
        for weight, part in zip(group.weights, parts, strict=True):
            decoding.replace(tensors[weight.name], _axis_back(decoding, weight, part))


def _members(weights: Sequence[Weight]) -> list[list[Weight]]:
    """The weights of each group."""

    def kind(weight: Weight) -> tuple[int, tuple[int, ...]]:
        return weight.rows.shape[1], weight.channels_first.shape[1:]

    members: list[list[Weight]] = []
    for _, same in groupby(sorted(weights, key=kind), key=kind):
        room = 0
        for weight in same:
            if weight.integers.size > room:
                members.append([])
                room = _TOGETHER
            members[-1].append(weight)
            room -= weight.integers.size
    return members


def _group(weights: list[Weight]) -> _Group:
    bits, shift = (np.concatenate(parts) for parts in zip(*((w.bits, w.shift) for w in weights), strict=True))
    stored = np.concatenate([w.rows for w in weights])
    stored = np.where(shift[:, None] > 0, -stored, stored).view(np.uint8)
    channel, place = np.nonzero(np.arange(MAX_BITS) < bits[:, None])
    planes = (stored[channel] >> place[:, None].astype(np.uint8)) & np.uint8(1)
    filled = -len(planes) % 8
    planes = np.pad(planes, ((0, max(filled, 16 - len(planes))), (0, 0)))
    rows = np.packbits(planes.reshape(-1, 8, planes.shape[1]), axis=1, bitorder="little")[:, 0]
    return _Group(weights, np.append(2 * bits + shift, 2 * filled).astype(np.uint8), rows)


def _decode(decoding: Decoding, groups: Sequence[_Group]) -> list[Tensor]:
    """The integers of each group, [C, 1, K]."""
    op = decoding.op
    code = op("Cast", np.concatenate([g.codes for g in groups])[:, None, None], to=TensorProto.INT32)
    width = op("Div", code, np.array(2, np.int32))
    begin = op("CumSum", width, np.array(0, np.int32), exclusive=1)
    row = decoding.reshape(op("Div", begin, np.array(8, np.int32)), [-1, 1])
    right = op("Cast", op("Mod", begin, np.array([[8], [1]], np.int32)), to=TensorProto.UINT8)
    used = op("Add", width, op("Mod", begin, np.array([[1], [8]], np.int32)))
    left = op("Cast", op("Sub", np.array([[8], [16]], np.int32), used), to=TensorProto.UINT8)
    factor = op("Gather", _FACTORS, code)
    factor = op("Concat", factor, factor, axis=2)

    sizes = [size for g in groups for size in (len(g.codes) - 1, 1)]
    of_groups = zip(groups, *(decoding.split(t, sizes)[::2] for t in (row, right, left, factor)), strict=True)
    result: list[Tensor] = []
    end = 0
    for group, r, to_right, to_left, f in of_groups:
        start = end
        end += int((group.codes // 2).sum()) // 8
        index = op("Add", r, np.array([0, 1], np.int32) - (start + len(group.rows)))
        moved = op("BitShift", op("Gather", group.rows, index), to_right, direction="RIGHT")
        moved = op("Cast", op("BitShift", moved, to_left, direction="LEFT"), to=TensorProto.INT8)
        one, none = np.array(1, np.float32), np.array(0, np.int8)
        unit = np.array(2.0**-7, np.float32)
        result.append(op("QLinearMatMul", f, one, np.array(-1, np.int8), moved, unit, none, one, none))
    return result


def _axis_back(decoding: Decoding, weight: Weight, channels_first: Tensor) -> Tensor:
    if not weight.axis:
        return channels_first
    rank = weight.integers.ndim
    order = [weight.axis, *(k for k in range(rank) if k != weight.axis)]
    return decoding.op("Transpose", channels_first, perm=[order.index(k) for k in range(rank)])
