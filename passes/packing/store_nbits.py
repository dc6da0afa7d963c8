"""Weights of matrix products at the true size in memory, too: "nbits" storage, for ONNX Runtime alone.

    x ─ MatMul (K x N)         becomes    x ─ MatMulNBits of the channels at 2, 4 and 8 bits ─ Concat ─ Gather
    indices ─ Gather (V x K)   becomes    indices ─ GatherBlockQuantized, where all rows fit 2 or 4 bits

MatMulNBits (domain com.microsoft) keeps its weights packed while it runs. A group of channels has one width, the least
of 2, 4 and 8 that holds them; channels without a bit have the integer 0 in the narrowest group. Concat, and Gather,
which brings channels back into their order, are left out where there is one group. The operator takes unsigned integers

    w = s (u - 2^(b-1)),    0 <= u < 2^b

with a scale s for each block of consecutive weights. So no zero points are stored: a channel whose window reaches up to
2^(b-1) has its integers and scales negated. One scale for a channel is repeated for blocks as long as the operator
takes: 256 weights, or 128 at 2 bits, as ONNX Runtime 1.32 multiplies longer ones in float. Scales are float32
initializers: behind a Cast, ONNX Runtime takes them for 0 where nothing folds it. A table that equals a weight reads
the same bytes in another shape.

Activations are rounded to 8 bits, a block at a time (accuracy_level 4).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto

from rdoq_onnx.model import external, surgeon
from rdoq_onnx.model.graph import attribute
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.packing.channel_widths import widths_of

DOMAIN = "com.microsoft"
WIDTHS = (2, 4, 8)
LEAST_BLOCK, MOST_BLOCK = 16, 256
_MOST_AT_2_BITS = 128
_ACCURACY = 4
Known = dict[tuple[str, tuple[int, ...], bytes], Constant]  # what is stored, by its contents


@dataclass(frozen=True)
class StoreNBits(Pass):
    """Replace each MatMul whose weight [K, N] is INT8 ─ Cast ─ Mul by nodes that keep the weight packed.

    So are tables as QuantizeStored leaves them. A weight whose scales are of blocks that the operator does not take
    stays as it is, and a table with a row of 8 bits.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        known: Known = {}

        def store(graph: Graph) -> None:
            for node in [n for n in graph.nodes if n.op == "MatMul"]:
                weight = _read(node)
                if weight is not None:
                    _replace(graph, node, weight, known)
            for node in [n for n in graph.nodes if n.op == "Mul"]:
                table = _read_table(node)
                if table is not None:
                    _replace_table(graph, node, table, known)

        result = surgeon.edit(model, store)
        if known and all(opset.domain != DOMAIN for opset in result.opset_import):
            result.opset_import.add(domain=DOMAIN, version=1)
        return result


@dataclass(frozen=True)
class _Weight:
    """Integers [N, K] and scales [N, B] of blocks of `block` weights, 0 for one of a whole channel."""

    name: str
    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    block: int


def _read(node: Node) -> _Weight | None:
    """Return the weight that a MatMul reads, if it has the form above."""
    decoded = node.inputs[1]
    product = decoded.inputs[0] if decoded.inputs else None
    if product is None or product.op != "Mul" or not product.inputs[0].inputs:
        return None
    cast, factors = product.inputs[0].inputs[0], product.inputs[1]
    integers = surgeon.values(cast.inputs[0]) if cast.op == "Cast" else None
    if integers is None or integers.dtype != np.int8 or integers.ndim != 2:
        return None
    scales, block = surgeon.values(factors), 0
    if scales is None and factors.inputs and factors.inputs[0].op == "Gather":
        scales, block = _of_blocks(factors.inputs[0], len(integers))
    if scales is None or scales.size % integers.shape[1]:
        return None
    return _Weight(decoded.name, integers.T, scales.reshape(-1, integers.shape[1]).T, block)


def _read_table(node: Node) -> _Weight | None:
    """Return the table whose rows a Mul decodes, if it has the form of QuantizeStored."""
    makers = [t.inputs[0] if t.inputs else None for t in node.inputs]
    cast, factors = makers if len(makers) == 2 else (None, None)
    rows = cast.inputs[0].inputs[0] if cast is not None and cast.op == "Cast" and cast.inputs[0].inputs else None
    if rows is None or factors is None or rows.op != "Gather" or factors.op != "Gather":
        return None
    integers, scales = surgeon.values(rows.inputs[0]), surgeon.values(factors.inputs[0])
    if integers is None or scales is None or integers.dtype != np.int8 or integers.ndim != 2:
        return None
    same = rows.inputs[1] is factors.inputs[1] and scales.size == len(integers)
    return _Weight(rows.inputs[0].name, integers, scales.reshape(-1, 1), 0) if same else None


def _of_blocks(gather: Node, count: int) -> tuple[NDArray[np.float32] | None, int]:
    """Return scales [B, N] and their block size, if the operator takes blocks of that size."""
    scales = surgeon.values(gather.inputs[0])
    numbers = surgeon.values(gather.inputs[1].inputs[0].inputs[0])
    if scales is None or numbers is None or gather.attrs.get("axis", 0):
        return None, 0
    block = count // len(scales)
    whole = np.array_equal(numbers, np.arange(count) // max(block, 1))
    fits = LEAST_BLOCK <= block <= MOST_BLOCK and block & (block - 1) == 0
    return (scales, block) if whole and fits else (None, 0)


def _replace_table(graph: Graph, node: Node, table: _Weight, known: Known) -> None:
    needed, shifted = widths_of(table.integers)
    bits = int(np.array(WIDTHS)[np.searchsorted(WIDTHS, needed)].max())
    count = table.integers.shape[1]
    if bits == WIDTHS[-1] or count % (8 // bits):
        return
    rows = np.arange(len(table.integers))
    (data, scales), attrs = _packed(graph, table, rows, shifted > 0, bits, known)
    whole = data.values.reshape(len(rows), -1)
    if whole.shape[1] * 8 == count * bits:
        shape = surgeon.constant(surgeon.fresh(graph, f"{table.name}_shape"), np.array(whole.shape, np.int64))
        data = surgeon.append(graph, "Reshape", [data, shape], f"{table.name}_Reshape")
    else:  # without what fills up the last block
        data = surgeon.constant(surgeon.fresh(graph, f"{table.name}_rows"), whole[:, : count * bits // 8].copy())
    index = node.inputs[0].inputs[0].inputs[0].inputs[0].inputs[1]
    node.op, node.domain, node.inputs = "GatherBlockQuantized", DOMAIN, [data, index, scales]
    node.attrs = {"bits": bits, "block_size": attrs["block_size"], "gather_axis": 0, "quantize_axis": 1}


def _replace(graph: Graph, node: Node, weight: _Weight, known: Known) -> None:
    needed, shifted = widths_of(weight.integers)
    sizes = np.array(WIDTHS)[np.searchsorted(WIDTHS, needed)]
    parts: list[Tensor] = []
    order: list[NDArray[np.int64]] = []
    for bits in np.unique(sizes).tolist():
        channels = np.flatnonzero(sizes == bits)
        inputs, attrs = _packed(graph, weight, channels, shifted[channels] > 0, bits, known)
        inputs, order = [node.inputs[0], *inputs], [*order, channels]
        if len(channels) == len(sizes):
            node.op, node.domain, node.attrs, node.inputs = "MatMulNBits", DOMAIN, attrs, inputs
            return
        product = surgeon.append(graph, "MatMulNBits", inputs, f"{node.name}_{bits}", attrs=attrs)
        product.inputs[0].domain = DOMAIN
        parts.append(product)
    joined = surgeon.append(graph, "Concat", parts, f"{node.name}_Concat", attrs={"axis": -1})
    place = np.argsort(np.concatenate(order))
    index = surgeon.constant(surgeon.fresh(graph, f"{weight.name}_order"), place.astype(np.int32))
    node.op, node.attrs, node.inputs = "Gather", {"axis": -1}, [joined, index]


def _packed(
    graph: Graph, weight: _Weight, channels: NDArray[np.int64], shifted: NDArray[np.bool_], bits: int, known: Known
) -> tuple[list[Constant], dict[str, int]]:
    """Return the inputs and attributes of the operator for `channels`. shifted: those to be negated."""
    signs = np.where(shifted, -1, 1)[:, None]
    integers, scales = weight.integers[channels].astype(np.int16) * signs, weight.scales[channels] * signs
    count = integers.shape[1]
    longest = min(MOST_BLOCK if bits > WIDTHS[0] else _MOST_AT_2_BITS, 1 << max(count - 1, 1).bit_length())
    block = min(weight.block or longest, longest)
    blocks = -(-count // block)
    spread = np.repeat(scales, blocks // scales.shape[1], axis=1)
    unsigned = np.zeros((len(channels), blocks * block), np.uint8)
    unsigned[:, :count] = integers + (1 << bits - 1)
    unsigned[:, count:] = 1 << bits - 1
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    data = np.bitwise_or.reduce(unsigned.reshape(len(channels), blocks, -1, per_byte) << shifts, axis=-1)
    inputs = []
    for name, value in (("weights", data), ("scales", np.ascontiguousarray(spread, np.float32))):
        key = (value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest())
        if key not in known:
            known[key] = surgeon.constant(surgeon.fresh(graph, f"{weight.name}_{bits}_{name}"), value)
        inputs.append(known[key])
    attrs = {"K": count, "N": len(channels), "bits": bits, "block_size": block, "accuracy_level": _ACCURACY}
    return inputs, attrs


def stored_integers(node: NodeProto, graph: GraphProto) -> NDArray[np.int16] | None:
    """Return the integers of what StoreNBits made, given its last node: [K, N] of a MatMul, [V, K] of a table.

    None of any other node.
    """
    makers = {o: n for n in graph.node for o in n.output}
    tensors = {t.name: t for t in graph.initializer}
    if node.op_type == "GatherBlockQuantized":
        shaped = makers.get(node.input[0])
        data = external.values(tensors[node.input[0] if shaped is None else shaped.input[0]])
        return _signed(data.reshape(len(data), -1), attribute(node, "bits", 4))
    groups = list(_groups(node, makers))
    if not groups or any(n.op_type != "MatMulNBits" for n in groups):
        return None
    integers = np.concatenate([_integers(n, external.values(tensors[n.input[1]])) for n in groups])
    if node.op_type == "Gather":
        integers = integers[external.values(tensors[node.input[1]])]
    return integers.T


def _groups(node: NodeProto, makers: dict[str, NodeProto]) -> Iterator[NodeProto]:
    joined = makers.get(node.input[0]) if node.op_type == "Gather" else None
    names: Sequence[str] = joined.input if joined is not None and joined.op_type == "Concat" else ()
    yield from (makers[name] for name in names) if names else iter([node])


def _integers(node: NodeProto, data: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Return the integers [N, K] of one group."""
    return _signed(data, attribute(node, "bits", 4))[:, : attribute(node, "K", 0)]


def _signed(data: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    unsigned = (data[..., None] >> shifts & ((1 << bits) - 1)).reshape(len(data), -1)
    return unsigned.astype(np.int16) - (1 << bits - 1)
