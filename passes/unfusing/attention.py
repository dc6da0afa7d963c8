"""Attention as matrix products and a Softmax, so that quantizers fit in between.

    attention(Q, K, V) = softmax(c QKᵀ + M) V        (Vaswani et al., 2017)

Q [N, H, S, D], K and V [N, H, T, D]; M is 0 where a query may read a key, and very negative elsewhere.
"""

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Tensor
from rdoq_onnx.passes.unfusing.block import LOWEST, Block, Results


def standard_attention(block: Block) -> Results:
    """Attention of opset 23 and 24."""
    names = ("is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap")
    known = block.knows("softmax_precision", *names) and block.attribute("softmax_precision", 1) == TensorProto.FLOAT
    if not known or block.input(6) is not None or block.read(3):
        return None
    query, key, value = block.required(3)
    heads = block.attribute("q_num_heads", 0)
    shared = block.attribute("kv_num_heads", 0) or heads
    if heads:
        width = block.width(query)
        depth = None if width is None else width // heads
        q, k, v = split_heads(block, query, heads), split_heads(block, key, shared), split_heads(block, value, shared)
    else:
        sizes = [block.sizes(t) for t in (query, key)]
        if any(s is None or len(s) != 4 or not isinstance(s[1], int) for s in sizes):
            return None
        (heads, shared), depth = (s[1] for s in sizes if s is not None), block.width(query)
        q, k, v = query, key, value
    if depth is None:
        return None
    k, v = with_past(block, k, v, 4)
    present, mask = (k, v), block.input(3)
    boolean = mask is not None and block.is_boolean(mask)
    if boolean is None:
        return None
    readable = readable_keys(block, q, k, past_length(block, 4)) if block.attribute("is_causal", 0) else None
    if mask is not None and boolean:
        readable = mask if readable is None else block.op("And", mask, readable)
    biases = [] if readable is None else [choice(block, readable, LOWEST)]
    if mask is not None and not boolean:
        biases.append(mask)
    scale = block.attribute("scale", 1 / math.sqrt(depth))
    k, v = (repeat_heads(block, t, shared, heads) for t in (k, v))
    mixed = attend(block, (q, k, v), scale, biases, block.attribute("softcap", 0.0))
    if boolean and readable is not None:  # a query that may read no key gets zeros
        mixed = block.op("Mul", mixed, block.greatest(block.op("Cast", readable, to=TensorProto.FLOAT)))
    return [merge_heads(block, mixed) if block.attribute("q_num_heads", 0) else mixed, *present]


def multi_head_attention(block: Block) -> Results:
    """MultiHeadAttention of com.microsoft, with keys and values apart and caches that grow."""
    query, key, value, bias, mask = (block.input(k) for k in range(5))
    if not block.knows("mask_filter_value", "num_heads", "scale", "unidirectional"):
        return None
    if query is None or key is None or value is None or block.read(3) or block.input(8) or block.input(9):
        return None
    ranks = [block.rank(t) for t in (query, key, value)]
    width, heads = block.width(query), block.attribute("num_heads", 1)
    if width is None or ranks[0] != 3 or ranks[1:] not in ([3, 3], [4, 4]) or (ranks[1] == 4 and bias is not None):
        return None
    padding = None if mask is None else _padding(block, mask)
    if mask is not None and padding is None:
        return None
    operands = [query, key, value]
    if bias is not None:
        last = block.width(value)
        if last is None:
            return None
        biases = _split_bias(block, bias, [width, width, last])
        operands = [block.op("Add", t, b) for t, b in zip(operands, biases, strict=True)]
    q, k, v = (split_heads(block, t, heads) if r == 3 else t for t, r in zip(operands, ranks, strict=True))
    k, v = with_past(block, k, v, 6)
    biases = [t for t in (padding, block.input(5)) if t is not None]
    if block.attribute("unidirectional", 0):
        biases.append(causal(block, q, k, past_length(block, 6)))
    mixed = attend(block, (q, k, v), _scale(block, width // heads), biases)
    return [merge_heads(block, mixed), k, v]


def packed_attention(block: Block) -> Results:
    """Attention of com.microsoft: the projections to queries, keys and values are one weight inside the operator."""
    data, weight, bias, mask = (block.input(k) for k in range(4))
    known = block.knows("mask_filter_value", "num_heads", "qkv_hidden_sizes", "scale", "unidirectional")
    if not known or data is None or weight is None or block.input(4) is not None or block.read(1):
        return None
    width, heads = block.width(weight), block.attribute("num_heads", 1)
    padding = None if mask is None else _padding(block, mask)
    if width is None or (mask is not None and padding is None):
        return None
    sizes = block.attribute("qkv_hidden_sizes", None) or [width // 3] * 3
    projected = block.op("MatMul", data, weight)
    if bias is not None:
        projected = block.op("Add", projected, bias)
    q, k, v = (split_heads(block, part, heads) for part in block.split(projected, sizes))
    biases = [t for t in (padding, block.input(5)) if t is not None]
    if block.attribute("unidirectional", 0):
        biases.append(causal(block, q, k, None))
    return [merge_heads(block, attend(block, (q, k, v), _scale(block, sizes[0] // heads), biases))]


def attend(
    block: Block, operands: tuple[Tensor, Tensor, Tensor], scale: float, biases: Sequence[Tensor], softcap: float = 0.0
) -> Tensor:
    """Q, K, V [N, H, ...] to the mixed values [N, H, S, D]."""
    q, k, v = operands
    scores = block.scaled(block.op("MatMul", q, block.op("Transpose", k, perm=[0, 1, 3, 2])), scale)
    if softcap:
        scores = block.scaled(block.op("Tanh", block.scaled(scores, 1 / softcap)), softcap)
    for bias in biases:
        scores = block.op("Add", scores, bias)
    return block.op("MatMul", block.op("Softmax", scores, axis=-1), v)


def split_heads(block: Block, tensor: Tensor, heads: int) -> Tensor:
    """[N, T, H D] to [N, H, T, D]."""
    parted = block.op("Reshape", tensor, block.integers(0, 0, heads, -1))
    return block.op("Transpose", parted, perm=[0, 2, 1, 3])


def merge_heads(block: Block, tensor: Tensor) -> Tensor:
    """[N, H, T, D] to [N, T, H D]."""
    return block.op("Reshape", block.op("Transpose", tensor, perm=[0, 2, 1, 3]), block.integers(0, 0, -1))


def repeat_heads(block: Block, tensor: Tensor, shared: int, heads: int) -> Tensor:
    """[N, shared, T, D] to [N, heads, T, D]: each head is read by heads / shared ones (Ainslie et al.: GQA, 2023)."""
    if shared == heads:
        return tensor
    apart, times = block.op("Unsqueeze", tensor, block.integers(2)), block.integers(1, 1, heads // shared, 1, 1)
    wide = block.op("Expand", apart, times)
    return block.op("Reshape", wide, _joined(block, tensor, heads))


def _joined(block: Block, tensor: Tensor, heads: int) -> Tensor:
    """The shape of `tensor` [N, H, T, D] with `heads` in place of H."""
    shape = block.op("Shape", tensor)
    first, rest = (block.op("Slice", shape, block.integers(a), block.integers(b)) for a, b in ((0, 1), (2, 4)))
    return block.op("Concat", first, block.integers(heads), rest, axis=0)


def with_past(block: Block, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Put the keys and values of the caches, inputs `index` and `index + 1`, in front."""
    past = block.input(index), block.input(index + 1)
    if past[0] is None or past[1] is None:
        return k, v
    return block.op("Concat", past[0], k, axis=2), block.op("Concat", past[1], v, axis=2)


def past_length(block: Block, index: int) -> Tensor | None:
    past = block.input(index)
    return None if past is None else block.dimension(past, 2)


def causal(block: Block, q: Tensor, k: Tensor, past: Tensor | None, window: int = -1) -> Tensor:
    """M [S, T] of causal attention."""
    return choice(block, readable_keys(block, q, k, past, window), LOWEST)


def readable_keys(block: Block, q: Tensor, k: Tensor, past: Tensor | None, window: int = -1) -> Tensor:
    """Whether query i, at position past + i, may read key j, [S, T]: up to its own, in a window only the last ones."""
    start, length, total = past or block.integer(0), block.dimension(q, 2), block.dimension(k, 2)
    rows = block.op("Unsqueeze", block.span(start, block.op("Add", start, length)), block.integers(1))
    columns = block.span(block.integer(0), total)
    readable = block.op("GreaterOrEqual", rows, columns)
    if window > 0:
        near = block.op("Less", block.op("Sub", rows, columns), block.integer(window))
        readable = block.op("And", readable, near)
    return readable


def choice(block: Block, readable: Tensor, otherwise: float) -> Tensor:
    return block.op("Where", readable, block.number(0), block.number(float(otherwise)))


def _padding(block: Block, mask: Tensor) -> Tensor | None:
    """M from a mask of keys: [N, T] or [N, S, T] with 0 for padding, or [N] with each sample's length."""
    sizes, filter_value = block.sizes(mask), float(block.attribute("mask_filter_value", -10000.0))
    if sizes is None or len(sizes) > 3:
        return None
    if len(sizes) == 1:
        return _lengths(block, mask, filter_value)
    kept = block.op("Greater", mask, block.op("Cast", block.integer(0), to=_kind(block, mask)))
    axes = block.integers(1, 2) if len(sizes) == 2 else block.integers(1)
    return choice(block, block.op("Unsqueeze", kept, axes), filter_value)


def _lengths(block: Block, mask: Tensor, filter_value: float) -> Tensor | None:
    data = block.input(1) if block.node.op == "MultiHeadAttention" else block.input(0)
    sizes, lengths = (block.sizes(t) if t is not None else None for t in (data, mask))
    if data is None or not sizes or not lengths or sizes[0] is None or sizes[0] != lengths[0] or len(sizes) != 3:
        return None  # two or three numbers a sample are another form
    columns = block.span(block.integer(0), block.dimension(data, 1))
    limits = block.op("Cast", block.op("Unsqueeze", mask, block.integers(1, 2, 3)), to=TensorProto.INT64)
    return choice(block, block.op("Less", columns, limits), filter_value)


def _kind(block: Block, tensor: Tensor) -> int:
    return int(block.types[tensor.name].elem_type)


def _split_bias(block: Block, bias: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    value = surgeon.values(bias)
    if value is None:
        return block.split(bias, sizes)
    return [block.vector(part) for part in np.split(value, np.cumsum(sizes)[:-1])]


def _scale(block: Block, depth: int) -> float:
    return float(block.attribute("scale", 0.0) or 1 / math.sqrt(depth))
