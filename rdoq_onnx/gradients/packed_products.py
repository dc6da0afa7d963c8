"""The adjoint of MatMulNBits of com.microsoft: y = x Wᵀ, W [N, K] in integers of 2, 4 or 8 bits with scales for blocks.

W_nk = scale_nb (q_nk - zero_nb), b = k // block size        adj(x) = adj(y) W
"""

import numpy as np
from onnx import NodeProto

from rdoq_onnx.gradients.tape import Array, Grads, Tape, attribute, only, rule


@rule("com.microsoft.MatMulNBits")
def _matmul_nbits(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    codes, scales, zeros, order = (tape.value(name) for name in [*node.input, "", "", ""][1:5])
    if codes is None or scales is None or order is not None or attribute(node, "weight_prepacked", 0):
        return NotImplemented
    bits, block, inputs = (int(attribute(node, name, 4)) for name in ("bits", "block_size", "K"))
    units, blocks = attribute(node, "N"), -(-inputs // block)
    q = unpacked(codes.reshape(units, -1), bits).reshape(units, blocks, block)
    if zeros is None:
        zeros = np.full((units, blocks), 1 << (bits - 1))
    elif zeros.dtype == np.uint8:
        zeros = unpacked(zeros.reshape(units, -1), bits)[:, :blocks]
    weight = (q - zeros.reshape(units, blocks, 1)) * scales.reshape(units, blocks, 1).astype(np.float32)
    weight = weight.reshape(units, -1)[:, :inputs]
    return only(node, tape.op("MatMul", str(grads[0]), tape.constant(weight, node.input[0])))


def unpacked(codes: Array, bits: int) -> Array:
    """Integers of `bits` bits, the lowest bits of a byte first, [rows, bytes] -> [rows, bytes * 8 / bits]."""
    shifts = np.arange(0, 8, bits)
    parts = (codes[..., None] >> shifts) & ((1 << bits) - 1)
    return np.asarray(parts.reshape(len(codes), -1).astype(np.float32))
