"""INT8 weights stored in as many bits as their channels need, decoded by standard operators when a model is loaded.

The decode ends in the same INT8 tensor, so that everything behind it, DequantizeLinear first, stays as it was.

"packed": exactly b bits an element for a channel of width b, 0 to 8. FORMAT, for weights decoded together:

1. A channel's elements, in the weight's order, are a row of K integers q from l to l + 2^b - 1, l = -2^(b-1) + h with h
   0 or 1 (at b = 0, all are 0). b is the least that holds them, h the least at that b: nothing but the integers decides
   what is stored.
2. A UINT8 for each channel holds 2b + h. It is all that the decode needs to know, and one byte.
3. q - h is written in two's complement of b bits as b rows of K bits, the least significant first. Rows are what Gather
   copies as blocks of memory; picking elements one by one takes ten times as long.
4. Channels follow each other without a gap: weights by rising K and then as given, channels in their order; nodes are
   needed for each K, not for each weight. Where a channel has 0 bits, a row of K zeros stands before the first channel
   of its K: that row is fetched for it.
5. The stream of all bits is filled up by zeros to 8M. Its bit i is bit i / M (0 the least significant) of byte i mod M:
   a shift by s gives M consecutive bits at once, in an inner loop of M.

The decode takes the bytes to one bit each (BitShift), cuts them into rows (Split and Reshape, one for each K), and has
Gather fetch 8 rows a channel: for bit j the row min(j, b - 1) of the channel, which extends the sign, or the zeros at
0 bits. MatMulInteger weights them by 1, 2, 4 .. 64, -128; h is added, and the result cast to INT8. Bytes are handled as
UINT8 for as long as possible: ONNX Runtime keeps all intermediate results of folding until the session is made, and
their size is most of the time that it takes. All operators are of opset 13, in types that ONNX Runtime 1.20 has.

"native": initializers of 2, 4 and 8 bits, for runtimes that fold less. Cast takes them to INT8. Channels that need
different containers are sorted by them, concatenated and brought back into their order by a Gather.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from onnx.numpy_helper import to_array

from rdoq_onnx import surgeon
from rdoq_onnx.errors import ModelError
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalize import default_opset, raise_ir_version, raise_opset
from rdoq_onnx.surgeon import Constant, Graph, Node, Tensor, Variable

# Elements decoded together, unless one weight has more: 8 bytes each is the largest of the intermediate results.
_TOGETHER = 2**24
# ONNX Runtime does not fold what gives more than 1 GiB.
_FOLDABLE = 2**27
_MAX_BITS = 8
_OPSETS = {2: 25, 4: 21}


@dataclass(frozen=True)
class PackWeights(Pass):
    """Store each of the INT8 initializers `weights` in fewer bits; those that need 8 throughout stay.

    A weight's channel axis is that of the DequantizeLinear that reads it, or the first of the scales that multiply its
    Cast. Any other axis is decoded as well, but costs bits.

    storage: "packed" or "native", see above. "native" raises the opset to 21 for INT4 and to 25 for INT2.
    int2: whether "native" may use INT2.
    """

    weights: Sequence[str]
    storage: Literal["packed", "native"] = "packed"
    int2: bool = True

    def requires(self, model: ModelProto) -> None:
        kinds = {t.name: t.data_type for t in model.graph.initializer}
        for name in self.weights:
            if kinds.get(name) != TensorProto.INT8:
                raise ModelError(f"{name!r} is not an INT8 initializer")

    def __call__(self, model: ModelProto) -> ModelProto:
        weights = _read(model, self.weights)
        if self.storage == "packed":
            packed = [w for w in weights if w.integers.size < _FOLDABLE and min(w.bits, default=_MAX_BITS) < _MAX_BITS]
            return surgeon.edit(model, partial(_pack, weights=packed))
        containers = (2, 4, 8) if self.int2 else (4, 8)
        parts = {w: _containers(w, containers) for w in weights}
        used = {size for sizes in parts.values() for size in sizes.tolist()}
        opset = max((_OPSETS[size] for size in used & _OPSETS.keys()), default=0)
        if default_opset(model) < opset:
            model = raise_opset(model, opset)
            raise_ir_version(model)
        return surgeon.edit(model, partial(_store_parts, parts=parts))


@dataclass(frozen=True, eq=False)
class _Weight:
    """integers: int8 in the weight's shape; rows: the same [C, K]; bits, shift: b and h of each channel, uint8 [C]."""

    name: str
    integers: NDArray[np.int8]
    axis: int
    bits: NDArray[np.uint8]
    shift: NDArray[np.uint8]

    @property
    def rows(self) -> NDArray[np.int8]:
        return _rows(self.integers, self.axis)


def _rows(integers: NDArray[np.int8], axis: int) -> NDArray[np.int8]:
    return np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1)


def _read(model: ModelProto, names: Sequence[str]) -> list[_Weight]:
    """The weights of these names that have elements, each once."""
    tensors = {t.name: t for t in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    result = []
    for name in dict.fromkeys(names):
        integers = to_array(tensors[name])
        if integers.size and integers.ndim:
            axis = _axis(name, integers.ndim, readers, tensors)
            result.append(_Weight(name, integers, axis, *_widths(_rows(integers, axis))))
    return result


def _axis(name: str, rank: int, readers: dict[str, NodeProto], tensors: dict[str, TensorProto]) -> int:
    reader = readers.get(name)
    if reader is not None and reader.op_type == "DequantizeLinear":
        given = next((a.i for a in reader.attribute if a.name == "axis"), 1)
        return given % rank if -rank <= given < rank else 0
    product = readers.get(reader.output[0]) if reader is not None and reader.op_type == "Cast" else None
    scales = [tensors[i] for i in product.input if i in tensors] if product is not None else []
    return max(rank - len(scales[0].dims), 0) % rank if scales else 0


def _widths(rows: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """b and h of each row: the least of either whose window of 2^b integers holds the row."""
    least, greatest = rows.min(axis=1).astype(np.int16), rows.max(axis=1).astype(np.int16)
    bits, shift = np.full(len(rows), _MAX_BITS, np.uint8), np.zeros(len(rows), np.uint8)
    for b in range(_MAX_BITS - 1, -1, -1):
        for h in (1, 0) if b else (0,):
            low = h - ((1 << b) >> 1)
            fits = (least >= low) & (greatest < low + (1 << b))
            bits[fits], shift[fits] = b, h
    return bits, shift


def _pack(graph: Graph, weights: Sequence[_Weight]) -> None:
    tensors, constants = graph.tensors(), Constants(graph, {})
    for together in _batches(sorted(weights, key=lambda w: w.rows.shape[1])):
        groups = [_Group.of(list(g)) for _, g in groupby(together, key=lambda w: w.rows.shape[1])]
        for weight, decoded in zip(together, _decode(graph, groups, constants), strict=True):
            replace(graph, tensors[weight.name], decoded)


def _batches(weights: Sequence[_Weight]) -> list[list[_Weight]]:
    batches: list[list[_Weight]] = []
    room = 0
    for weight in weights:
        if not batches or weight.integers.size > room:
            batches.append([])
            room = _TOGETHER
        batches[-1].append(weight)
        room -= weight.integers.size
    return batches


@dataclass(frozen=True)
class _Group:
    """Weights of the same K. codes: 2b + h of each channel, uint8 [C, 1]; planes: rows of bits, uint8 [., K]."""

    weights: list[_Weight]
    codes: NDArray[np.uint8]
    planes: NDArray[np.uint8]

    @classmethod
    def of(cls, weights: list[_Weight]) -> "_Group":
        rows = np.concatenate([w.rows for w in weights])
        bits, shift = (np.concatenate(parts) for parts in zip(*((w.bits, w.shift) for w in weights), strict=True))
        zeros = np.zeros((int((bits == 0).any()), rows.shape[1]), np.uint8)
        codes = (2 * bits + shift)[:, None].astype(np.uint8)
        return cls(weights, codes, np.concatenate([zeros, _planes(rows, bits, shift)]))

    @property
    def rows_of_channels(self) -> int:
        return int((self.codes // 2).sum())

    @property
    def channels(self) -> list[int]:
        return [len(w.bits) for w in self.weights]


def _planes(rows: NDArray[np.int8], bits: NDArray[np.uint8], shift: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bits of the rows [C, K], 0 or 1: uint8 [sum of bits, K]."""
    codes = (rows - shift[:, None].astype(np.int16)).astype(np.uint8)
    place = np.arange(_MAX_BITS, dtype=np.uint8)
    channel, j = np.nonzero(place < bits[:, None])
    return (codes[channel] >> place[j, None]) & np.uint8(1)


@dataclass(frozen=True)
class Constants:
    """Initializers of small arrays, one for all that are equal."""

    graph: Graph
    known: dict[tuple[str, tuple[int, ...], bytes], Constant]

    def __call__(self, value: NDArray[np.generic]) -> Constant:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.known:
            self.known[key] = surgeon.constant(surgeon.fresh(self.graph, "unpack_constant"), value)
        return self.known[key]


def split(graph: Graph, tensor: Tensor, sizes: Sequence[int], constants: Constants) -> list[Tensor]:
    """Parts of `tensor` along axis 0; itself if that is one part."""
    if len(sizes) == 1:
        return [tensor]
    parts = [Variable(surgeon.fresh(graph, "unpack_Split_out")) for _ in sizes]
    inputs = [tensor, constants(np.array(sizes, np.int64))]
    graph.nodes.append(Node("Split", surgeon.fresh(graph, "unpack_Split"), None, inputs, parts))
    return parts


def replace(graph: Graph, old: Tensor, new: Tensor) -> None:
    """Have all that read `old` read `new`."""
    surgeon.insert_after(graph, old, lambda _: new)


def _decode(graph: Graph, groups: Sequence[_Group], constants: Constants) -> list[Tensor]:
    """Nodes that decode the weights of all groups, in their order; `constants` are shared."""

    def op(kind: str, *inputs: Tensor | NDArray[np.generic], **attrs: object) -> Variable:
        tensors = [constants(i) if isinstance(i, np.ndarray) else i for i in inputs]
        return surgeon.append(graph, kind, tensors, f"unpack_{kind}", attrs=dict(attrs))

    def cut(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        return split(graph, tensor, sizes, constants)

    flat = np.concatenate([g.planes.reshape(-1) for g in groups])
    spare = -flat.size % 8
    stream = np.packbits(np.append(flat, np.zeros(spare, np.uint8)).reshape(8, -1), axis=0, bitorder="little")[0]
    shifted = op("BitShift", stream, np.arange(7, -1, -1, dtype=np.uint8)[:, None], direction="LEFT")
    bits = op("Reshape", op("BitShift", shifted, np.array(7, np.uint8), direction="RIGHT"), np.array([-1], np.int64))
    planes = cut(bits, [g.planes.size for g in groups] + ([spare] if spare else []))

    code = op("Cast", np.concatenate([g.codes for g in groups]), to=TensorProto.INT32)
    width, shift = op("Div", code, np.array(2, np.int32)), op("Mod", code, np.array(2, np.int32))
    first = op("CumSum", width, np.array(0, np.int32), exclusive=1)
    # The last bit's place at each width; at width 0 so far down that the row is the group's first, whichever that is.
    last = op("Gather", np.array([-(2**30), *range(_MAX_BITS)], np.int32), width)
    index = op("Add", first, op("Min", np.arange(_MAX_BITS, dtype=np.int32), last))
    indices, shifts = (cut(t, [sum(g.channels) for g in groups]) for t in (index, shift))

    result, start = [], 0
    for group, bit_rows, rows, h in zip(groups, planes, indices, shifts, strict=False):
        zeros = len(group.planes) - group.rows_of_channels
        if start - zeros:
            rows = op("Sub", rows, np.array(start - zeros, np.int32))
        if zeros:
            rows = op("Max", rows, np.array(0, np.int32))
        start += group.rows_of_channels
        k = group.planes.shape[1]
        of_channels = op("Gather", op("Reshape", bit_rows, np.array([-1, k], np.int64)), rows)
        # The weights less a zero point of 128, as kernels for UINT8 on both sides are the ones that all versions have.
        powers = np.array([129, 130, 132, 136, 144, 160, 192, 0], np.uint8)
        integers = op("Add", op("MatMulInteger", powers, of_channels, np.array(128, np.uint8)), h)
        decoded = cut(op("Cast", integers, to=TensorProto.INT8), group.channels)
        result += [_in_shape(graph, w, d, constants) for w, d in zip(group.weights, decoded, strict=True)]
    return result


def _in_shape(graph: Graph, weight: _Weight, rows: Tensor, constants: Constants) -> Tensor:
    """Rows [C, K] as the weight's tensor."""
    shape, rank = weight.integers.shape, weight.integers.ndim
    order = [weight.axis, *(k for k in range(rank) if k != weight.axis)]
    if rank != 2:
        moved = constants(np.array([shape[k] for k in order], np.int64))
        rows = surgeon.append(graph, "Reshape", [rows, moved], "unpack_Reshape")
    if weight.axis:
        attrs = {"perm": [order.index(k) for k in range(rank)]}
        rows = surgeon.append(graph, "Transpose", [rows], "unpack_Transpose", attrs=attrs)
    return rows


def _containers(weight: _Weight, sizes: Sequence[int]) -> NDArray[np.uint8]:
    """The least of `sizes` that holds each channel in two's complement, [C]."""
    needed = weight.bits + weight.shift  # a window that reaches up to 2^(b-1) needs one bit more
    result: NDArray[np.uint8] = np.array(sizes, np.uint8)[np.searchsorted(sizes, needed)]
    return result


def _store_parts(graph: Graph, parts: dict[_Weight, NDArray[np.uint8]]) -> None:
    tensors = graph.tensors()
    for weight, sizes in parts.items():
        if sizes.min() < _MAX_BITS:
            replace(graph, tensors[weight.name], _joined(graph, weight, sizes))


def _joined(graph: Graph, weight: _Weight, sizes: NDArray[np.uint8]) -> Tensor:
    """The weight, put together from its channels in containers of `sizes`."""

    def cast(stored: NDArray[np.generic] | TensorProto, kind: int) -> Tensor:
        constant = surgeon.constant(surgeon.fresh(graph, f"{weight.name}_part"), stored)
        return surgeon.append(graph, "Cast", [constant], "unpack_Cast", attrs={"to": kind})

    order = np.argsort(sizes, kind="stable")
    parts: list[Tensor] = []
    for size in np.unique(sizes):
        part = np.take(weight.integers, np.flatnonzero(sizes == size), weight.axis)
        if size == _MAX_BITS:
            parts.append(surgeon.constant(surgeon.fresh(graph, f"{weight.name}_part"), part))
        else:
            parts.append(cast(_sub_byte(part, int(size)), TensorProto.INT8))
    if len(parts) == 1:
        return parts[0]
    place = np.argsort(order).astype(np.min_scalar_type(len(order) - 1))
    axis = {"axis": weight.axis}
    together = surgeon.append(graph, "Concat", parts, "unpack_Concat", attrs=axis)
    return surgeon.append(graph, "Gather", [together, cast(place, TensorProto.INT32)], "unpack_Gather", attrs=axis)


def _sub_byte(integers: NDArray[np.int8], size: int) -> TensorProto:
    """INT2 or INT4: the first of the integers that share a byte is in its lowest bits."""
    flat = integers.reshape(-1).view(np.uint8) & ((1 << size) - 1)
    in_bytes = np.append(flat, np.zeros(-flat.size % (8 // size), np.uint8)).reshape(-1, 8 // size)
    data = np.bitwise_or.reduce(in_bytes << np.arange(0, 8, size, dtype=np.uint8), axis=1)
    kind = TensorProto.DataType.Value(f"INT{size}")
    return TensorProto(data_type=kind, dims=integers.shape, raw_data=data.tobytes())
