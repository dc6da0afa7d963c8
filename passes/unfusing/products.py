"""FusedMatMul: α op(A) op(B), op an optional transposition of the last two axes."""

from rdoq_onnx.model.surgeon import Tensor
from rdoq_onnx.passes.unfusing.block import Block, Results


def fused_matmul(block: Block) -> Results:
    if block.attribute("transBatchA", 0) or block.attribute("transBatchB", 0):
        return None
    turned: list[Tensor] = []
    for tensor, turn in zip(block.required(2), ("transA", "transB"), strict=True):
        if block.attribute(turn, 0):
            rank = block.rank(tensor)
            if rank is None:
                return None
            if rank > 1:  # a vector stays one
                tensor = block.op("Transpose", tensor, perm=[*range(rank - 2), rank - 1, rank - 2])
        turned.append(tensor)
    return [block.scaled(block.op("MatMul", *turned), block.attribute("alpha", 1.0))]
