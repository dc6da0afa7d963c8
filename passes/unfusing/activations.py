"""The Gelu family.

    Gelu(x) = x/2 (1 + erf(x/√2))        FastGelu(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))
    BiasGelu(x, b) = Gelu(x + b)         QuickGelu(x) = x σ(αx)

(Hendrycks, Gimpel: Gaussian error linear units, 2016.) In these forms ONNX Runtime fuses them again when it loads them.
"""

import math

from rdoq_onnx.model.surgeon import Tensor
from rdoq_onnx.passes.unfusing.block import Block, Results

_CUBIC = 0.044715


def gelu(block: Block) -> Results:
    """Gelu of either domain, with the approximation by tanh, too."""
    (x,) = block.required(1)
    return [_by_tanh(block, x) if block.attribute("approximate", "none") == "tanh" else _by_erf(block, x)]


def bias_gelu(block: Block) -> Results:
    return [_by_erf(block, block.op("Add", *block.required(2)))]


def fast_gelu(block: Block) -> Results:
    (x,), bias = block.required(1), block.input(1)
    return [_by_tanh(block, x if bias is None else block.op("Add", x, bias))]


def quick_gelu(block: Block) -> Results:
    (x,) = block.required(1)
    gate = block.op("Sigmoid", block.scaled(x, block.attribute("alpha", 1.702)))
    return [block.op("Mul", x, gate)]


def _by_erf(block: Block, x: Tensor) -> Tensor:
    error = block.op("Erf", block.op("Div", x, block.number(math.sqrt(2))))
    return block.op("Mul", block.op("Mul", x, block.op("Add", error, block.number(1))), block.number(0.5))


def _by_tanh(block: Block, x: Tensor) -> Tensor:
    cubic = block.op("Mul", block.op("Pow", x, block.number(3)), block.number(_CUBIC))
    inner = block.op("Mul", block.op("Add", x, cubic), block.number(math.sqrt(2 / math.pi)))
    return block.op(
        "Mul", block.op("Mul", x, block.op("Add", block.op("Tanh", inner), block.number(1))), block.number(0.5)
    )
