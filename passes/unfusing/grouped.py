"""GroupQueryAttention of com.microsoft, for caches that hold exactly the tokens before: present = [past, new].

With caches in a shared buffer, or padded samples, the operator computes something else; whoever writes it out compares.
"""

import math

from rdoq_onnx.passes.unfusing.attention import (
    attend,
    causal,
    merge_heads,
    past_length,
    repeat_heads,
    split_heads,
    with_past,
)
from rdoq_onnx.passes.unfusing.block import Block, Results
from rdoq_onnx.passes.unfusing.rotary import angles_at, rotate

_LEFT = (11, 12, 13, 14, 15, 16)  # sinks, scales of quantized caches, norms of Q and K, padded chunks


def group_query_attention(block: Block) -> Results:
    query, key, value = (block.input(k) for k in range(3))
    known = ("do_rotary", "kv_num_heads", "local_window_size", "num_heads", "rotary_interleaved", "scale", "softcap")
    plain = block.attribute("causal", 1) and block.knows("causal", *known)
    if query is None or not plain or block.read(3) or any(block.input(k) is not None for k in _LEFT):
        return None
    heads, shared, width = block.attribute("num_heads", 1), block.attribute("kv_num_heads", 1), block.width(query)
    if width is None:
        return None
    if key is None or value is None:
        depth = width // (heads + 2 * shared)
        query, key, value = block.split(query, [heads * depth, shared * depth, shared * depth])
    else:
        depth = width // heads
    q, k, v = split_heads(block, query, heads), split_heads(block, key, shared), split_heads(block, value, shared)
    past = past_length(block, 3)
    if block.attribute("do_rotary", 0):
        tables = block.input(7), block.input(8)
        if tables[0] is None or tables[1] is None or (half := block.width(tables[0])) is None:
            return None
        start = past or block.integer(0)
        positions = block.span(start, block.op("Add", start, block.dimension(k, 2)))
        rows = block.op("Unsqueeze", positions, block.integers(0))
        angles = angles_at(block, (tables[0], tables[1]), rows)
        q, k = (rotate(block, t, angles, half, depth) for t in (q, k))
    k, v = present = with_past(block, k, v, 3)
    bias = block.input(10)
    biases = [causal(block, q, k, past, block.attribute("local_window_size", -1)), *([] if bias is None else [bias])]
    k, v = (repeat_heads(block, t, shared, heads) for t in (k, v))
    scale = block.attribute("scale", 0.0) or 1 / math.sqrt(depth)
    return [merge_heads(block, attend(block, (q, k, v), scale, biases, block.attribute("softcap", 0.0))), *present]
