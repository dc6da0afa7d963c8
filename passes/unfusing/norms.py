"""Normalizations: RMS norms as arithmetic, sums and embeddings in front of a norm.

RMSNorm(x) = x / √(mean(x²) + ε) · γ (Zhang, Sennrich, 2019)
SkipLayerNormalization(x, s, b) = LayerNorm(x + b + s)
EmbedLayerNormalization = LayerNorm(words[ids] + positions[0 ... T-1] + segments[segment_ids])
"""

from collections.abc import Sequence

from rdoq_onnx.model.surgeon import Tensor
from rdoq_onnx.passes.unfusing.block import Block, Results


def rms_norm(block: Block) -> Results:
    """RMSNormalization (opset 23) and ONNX Runtime's SimplifiedLayerNormalization, over all axes from one on."""
    x, scale = block.required(2)
    rank, axis = block.rank(x), block.attribute("axis", -1)
    if block.read(1) or (axis >= 0 and rank is None):
        return None
    return [_rms(block, x, scale, range(axis - (rank or 0) if axis >= 0 else axis, 0))]


def skip_layer_norm(block: Block) -> Results:
    if block.read(1) or block.read(2):
        return None
    total = _sum(block, block.input(4))
    affine = [t for t in (block.input(2), block.input(3)) if t is not None]
    return [_layer_norm(block, total, *affine), None, None, total]


def skip_rms_norm(block: Block) -> Results:
    if block.read(1) or block.read(2):
        return None
    total = _sum(block, block.input(3))
    return [_rms(block, total, block.node.inputs[2]), None, None, total]


def embed_layer_norm(block: Block) -> Results:
    ids, words, positions = (block.node.inputs[k] for k in (0, 2, 3))
    segment_ids, segments, mask, position_ids = (block.input(k) for k in (1, 4, 7, 8))
    if block.read(1) and mask is None:
        return None
    if position_ids is None:
        position_ids = block.span(block.integer(0), block.dimension(ids, 1))
    total = block.op("Add", block.op("Gather", words, ids), block.op("Gather", positions, position_ids))
    if segment_ids is not None and segments is not None:
        total = block.op("Add", total, block.op("Gather", segments, segment_ids))
    normal = _layer_norm(block, total, block.node.inputs[5], block.node.inputs[6])
    lengths = block.op("ReduceSum", mask, block.integers(1), keepdims=0) if mask is not None and block.read(1) else None
    return [normal, lengths, total]


def _sum(block: Block, bias: Tensor | None) -> Tensor:
    """The sum of the first two inputs; a bias goes to the one that a layer makes."""
    x, skip = block.required(2)
    if bias is None:
        return block.op("Add", x, skip)
    makers = [t.inputs[0].op if t.inputs else "" for t in (x, skip)]
    if makers[1] == "MatMul" != makers[0]:
        return block.op("Add", x, block.op("Add", skip, bias))
    return block.op("Add", block.op("Add", x, bias), skip)


def _layer_norm(block: Block, x: Tensor, *affine: Tensor) -> Tensor:
    return block.op("LayerNormalization", x, *affine, axis=-1, epsilon=block.attribute("epsilon", 1e-12))


def _rms(block: Block, x: Tensor, scale: Tensor, axes: Sequence[int] = (-1,)) -> Tensor:
    power = block.mean(block.op("Pow", x, block.number(2)), axes)
    root = block.op("Sqrt", block.op("Add", power, block.number(block.attribute("epsilon", 1e-5))))
    return block.op("Mul", block.op("Div", x, root), scale)
