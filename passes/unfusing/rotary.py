"""Rotary positions: each pair of a head's elements is turned by its position's angle (Su et al., 2021).

(x₁, x₂) -> (x₁ cos - x₂ sin, x₁ sin + x₂ cos)
"""

from rdoq_onnx.model.surgeon import Tensor
from rdoq_onnx.passes.unfusing.attention import merge_heads, split_heads
from rdoq_onnx.passes.unfusing.block import Block, Results


def standard_rotary(block: Block) -> Results:
    """RotaryEmbedding of opset 23: tables [N, T, R/2], or [positions, R/2] with positions."""
    x, cosines, sines = block.required(3)
    return _rotated_input(block, x, (cosines, sines), block.input(3))


def microsoft_rotary(block: Block) -> Results:
    """RotaryEmbedding of com.microsoft: positions [N, T]; one offset for all is left."""
    x, positions, cosines, sines = block.required(4)
    scaled = block.attribute("scale", 1.0) != 1 or block.attribute("is_packed_batching", 0)
    if scaled or block.rank(positions) != 2:
        return None
    return _rotated_input(block, x, (cosines, sines), positions)


def _rotated_input(block: Block, x: Tensor, tables: tuple[Tensor, Tensor], positions: Tensor | None) -> Results:
    rank, half, width = block.rank(x), block.width(tables[0]), block.width(x)
    if rank not in (3, 4) or half is None or width is None:
        return None
    heads = block.attribute("num_heads", 0) or (width // (2 * half) if rank == 3 else 0)
    angles = angles_at(block, tables, positions)
    wide = split_heads(block, x, heads) if rank == 3 else x
    turned = rotate(block, wide, angles, half, width // heads if rank == 3 else width)
    return [merge_heads(block, turned) if rank == 3 else turned]


def angles_at(block: Block, tables: tuple[Tensor, Tensor], positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N or 1, 1, T, R/2]."""
    rows = tables if positions is None else tuple(block.op("Gather", table, positions, axis=0) for table in tables)
    cosines, sines = (block.op("Unsqueeze", row, block.integers(1)) for row in rows)
    return cosines, sines


def rotate(block: Block, x: Tensor, angles: tuple[Tensor, Tensor], half: int, width: int) -> Tensor:
    """Turn the first 2 · `half` of the `width` elements of x [N, H, T, width]."""
    cosines, sines = angles
    moved, rest = block.split(x, [2 * half, width - 2 * half]) if width > 2 * half else (x, None)
    interleaved = block.attribute("interleaved", 0) or block.attribute("rotary_interleaved", 0)
    if interleaved:
        pairs = block.split(block.op("Reshape", moved, block.integers(0, 0, 0, half, 2)), [1, 1])
        first, second = (block.op("Squeeze", part, block.integers(-1)) for part in pairs)
    else:
        first, second = block.split(moved, [half, half])
    one = block.op("Sub", block.op("Mul", first, cosines), block.op("Mul", second, sines))
    two = block.op("Add", block.op("Mul", first, sines), block.op("Mul", second, cosines))
    if interleaved:
        stacked = block.op("Concat", *(block.op("Unsqueeze", t, block.integers(-1)) for t in (one, two)), axis=-1)
        turned = block.op("Reshape", stacked, block.integers(0, 0, 0, 2 * half))
    else:
        turned = block.op("Concat", one, two, axis=-1)
    return turned if rest is None else block.op("Concat", turned, rest, axis=-1)
