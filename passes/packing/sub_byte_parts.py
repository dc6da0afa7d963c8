"""Weights in initializers of 2, 4 and 8 bits: "native" storage, see pack_weights.py.

Cast takes the initializers to INT8. Channels that need different containers are sorted by them, concatenated and
brought back into their order by a Gather.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Graph, Tensor
from rdoq_onnx.passes.packing.channel_widths import MAX_BITS, Weight
from rdoq_onnx.passes.packing.decoding import Decoding

_OPSETS = {2: 25, 4: 21}
# Bytes of the nodes for each container: what saves less stays INT8.
_PART_NODES = 90


def containers(weight: Weight, sizes: Sequence[int]) -> NDArray[np.uint8]:
    """The least of `sizes` that holds each channel in two's complement, [C]."""
    needed = weight.bits + weight.shift  # a window that reaches up to 2^(b-1) needs one bit more
    result: NDArray[np.uint8] = np.array(sizes, np.uint8)[np.searchsorted(sizes, needed)]
    return result


def is_smaller(weight: Weight, sizes: NDArray[np.uint8]) -> bool:
    """Whether the weight takes fewer bytes of the file in these containers."""
    per_channel = weight.integers.size // len(sizes)
    parts = len(np.unique(sizes))
    order = len(sizes) if parts > 1 else 0
    stored = int(sizes.sum()) * per_channel // 8 + order + parts * _PART_NODES
    return bool(sizes.min() < MAX_BITS) and stored < weight.integers.size


def opset_of(parts: Iterable[NDArray[np.uint8]]) -> int:
    """The opset that has the types of these containers."""
    used = {size for sizes in parts for size in sizes.tolist()}
    return max((_OPSETS[size] for size in used & _OPSETS.keys()), default=0)


def store_parts(graph: Graph, parts: dict[Weight, NDArray[np.uint8]]) -> None:
    """Have each weight put together from its channels in the containers given."""
    tensors, decoding = surgeon.all_tensors(graph), Decoding(graph)
    for weight, sizes in parts.items():
        decoding.replace(tensors[weight.name], _joined(decoding, weight, sizes))


def _joined(decoding: Decoding, weight: Weight, sizes: NDArray[np.uint8]) -> Tensor:
    def stored(value: NDArray[np.generic] | TensorProto) -> Tensor:
        return surgeon.constant(surgeon.fresh(decoding.graph, f"{weight.name}_part"), value)

    order = np.argsort(sizes, kind="stable")
    parts: list[Tensor] = []
    for size in np.unique(sizes):
        part = np.take(weight.integers, np.flatnonzero(sizes == size), weight.axis)
        if size == MAX_BITS:
            parts.append(stored(part))
        else:
            parts.append(decoding.op("Cast", stored(_sub_byte(part, int(size))), to=TensorProto.INT8))
    if len(parts) == 1:
        return parts[0]
    place = np.argsort(order).astype(np.min_scalar_type(len(order) - 1))
    index = decoding.op("Cast", stored(place), to=TensorProto.INT32)
    return decoding.op("Gather", decoding.op("Concat", *parts, axis=weight.axis), index, axis=weight.axis)


def _sub_byte(integers: NDArray[np.int8], size: int) -> TensorProto:
    """INT2 or INT4: the first of the integers that share a byte is in its lowest bits."""
    flat = integers.reshape(-1).view(np.uint8) & ((1 << size) - 1)
    in_bytes = np.append(flat, np.zeros(-flat.size % (8 // size), np.uint8)).reshape(-1, 8 // size)
    data = np.bitwise_or.reduce(in_bytes << np.arange(0, 8, size, dtype=np.uint8), axis=1)
    kind = TensorProto.DataType.Value(f"INT{size}")
    return TensorProto(data_type=kind, dims=integers.shape, raw_data=data.tobytes())
