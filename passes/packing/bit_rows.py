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
5. Eight rows of a group, one after the other, are a row of K bytes, the first in bit 0: a division moves a whole row of
   integers at once, and a channel lies in two neighbouring rows of bytes at most, whatever its width.
6. A group's last row of bytes is filled up by zeros. So that the next begins with a new row, the codes of a group end
   with one more, whose b is what was filled up. A group has two rows of bytes at least.
7. A channel that begins in bit p > 0 of a row of bytes is stored 1 lower, modulo 2^b, wherever the p bits below it
   exceed 2^(p-1): the decode rounds these bits away, which adds the 1 again.

The decode uses only what every runtime computes alike. OpenVINO takes a shift of bits for a product or quotient of
numbers, which it saturates and rounds, so there is none. Products, rounding to the nearest and Cast, which drops the
upper bits, are the same everywhere.

It numbers the rows of bits by a CumSum over the widths: a channel begins in bit p of row r of bytes. Gather fetches
rows x and y, r and r + 1, counted from the group's end: the row behind the last is then the first, and not missing.

    QLinearMatMul    x' = round(x 2^-p), y' = y        UINT8; a half is rounded down, as the scale is just below 2^-7
    MatMulInteger    z = x' 2^(8-b) + y' 2^(16-b-p)    the second factor is 0 where p + b <= 8: y is not needed
    Cast             z modulo 2^8, as INT8             that is q 2^(8-b): whatever was above the channel is gone
    QLinearMatMul    z 2^(b-1) 2^-7                    -2^(b-1) where h = 1; a zero point of -1 lets 128 be there

All of them are exact. ONNX Runtime keeps all results of folding until it has folded all, and copies the inputs of each
node: their size is most of the time and memory that loading takes, here 12 bytes an element. All operators are of opset
13, in types that ONNX Runtime 1.20 has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from rdoq_onnx.model import surgeon
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

# 2^(8-i), or 0 where i is none of 1 .. 8; i is -8 at least.
_POWERS = np.array([0, 128, 64, 32, 16, 8, 4, 2, 1, *[0] * 8], np.uint8)
# 2^-7, so much less that x 2^(7-p) times it rounds a half down, for all bytes x.
_BELOW = 2.0**-7 - 2.0**-17


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
    tensors, decoding = surgeon.all_tensors(graph), Decoding(graph)
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
    stored = np.where(shift[:, None] > 0, -stored, stored).astype(np.uint16)
    ends = np.cumsum(bits, dtype=np.int64)
    filled = -int(ends[-1]) % 8
    rows = np.zeros((max((int(ends[-1]) + filled) // 8, 2), stored.shape[1]), np.uint8)
    for integers, end, b in zip(stored, ends.tolist(), bits.tolist(), strict=True):
        if b:
            _place(rows, integers, end - b, b)
    return _Group(weights, np.append(2 * bits + shift, 2 * filled).astype(np.uint8), rows)


def _place(rows: NDArray[np.uint8], integers: NDArray[np.uint16], begin: int, bits: int) -> None:
    """Write a channel into `rows`, which hold all channels before it and are 0 from bit `begin` on."""
    row, bit = divmod(begin, 8)
    carry = rows[row] > 1 << bit >> 1 if bit else 0
    placed = (integers - carry) % np.uint16(1 << bits) << bit
    rows[row] |= placed.astype(np.uint8)
    if bit + bits > 8:
        rows[row + 1] |= (placed >> 8).astype(np.uint8)


def _decode(decoding: Decoding, groups: Sequence[_Group]) -> list[Tensor]:
    """The integers of each group, [C, 1, K]."""
    op = decoding.op
    codes = decoding.packed("bits", np.concatenate([g.codes for g in groups])[:, None, None])
    code = op("Cast", codes, to=TensorProto.INT32)
    width = op("Div", code, np.array(2, np.int32))
    begin = op("CumSum", width, np.array(0, np.int32), exclusive=1)
    row = decoding.reshape(op("Div", begin, np.array(8, np.int32)), [-1, 1])
    bit = op("Mod", begin, np.array([[8, 1], [1, 1]], np.int32))
    right = op("Gather", _POWERS, op("Add", bit, np.eye(2, dtype=np.int32)))
    used = op("Add", width, op("Mod", begin, np.array([[1, 8]], np.int32)))
    left = op("Gather", _POWERS, op("Sub", used, np.array([[0, 8]], np.int32)))
    factor = op("Gather", _FACTORS, code)

    sizes = [size for g in groups for size in (len(g.codes) - 1, 1)]
    of_groups = zip(groups, *(decoding.split(t, sizes)[::2] for t in (row, right, left, factor)), strict=True)
    one, none, minus = np.array(1, np.float32), np.array(0, np.int8), np.array(-1, np.int8)
    unit, below, zero = np.array(2.0**-7, np.float32), np.array(_BELOW, np.float32), np.array(0, np.uint8)
    result: list[Tensor] = []
    end = 0
    for group, r, to_right, to_left, f in of_groups:
        start = end
        end += int((group.codes // 2).sum()) // 8
        rows = decoding.packed(str(group.rows.shape[1]), group.rows)
        fetched = op("Gather", rows, op("Add", r, np.array([0, 1], np.int32) - (start + len(group.rows))))
        low = op("QLinearMatMul", to_right, one, zero, fetched, below, zero, one, zero)
        upper = op("Cast", op("MatMulInteger", to_left, low), to=TensorProto.INT8)
        result.append(op("QLinearMatMul", f, one, minus, upper, unit, none, one, none))
    return result


def _axis_back(decoding: Decoding, weight: Weight, channels_first: Tensor) -> Tensor:
    if not weight.axis:
        return channels_first
    rank = weight.integers.ndim
    order = [weight.axis, *(k for k in range(rank) if k != weight.axis)]
    return decoding.op("Transpose", channels_first, perm=[order.index(k) for k in range(rank)])
