"""Layers and activations of a network: plain data shared by passes and analysis."""

import math
from dataclasses import dataclass

from rdoq_onnx.model.linear import Linear

BRANCH = "/quantized"  # suffix of a branch's name after the tensor's
SCALING = "/scale_channels"  # suffix of the name of a Mul by channel scales
LAYER_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUSION_BITS = 8


@dataclass(frozen=True)
class Use:
    """One node that applies a layer's weight.

    data: its input beside the weight: what a matrix multiplies, or the indices of the rows that are looked up. It is
    empty, as is `output`, where the effect of the weight can only be measured as a whole. linear: how this node unfolds
    its data, with its own strides and pads.
    """

    node: str
    data: str
    output: str
    linear: Linear


@dataclass(frozen=True)
class Layer:
    """A weight, the nodes that apply it, and how it unfolds into rows. Named after its first node.

    blocks: what it is offered, numbers of consecutive weights of a row that share a scale; 0 for the whole row.
    """

    name: str
    weight: str
    linear: Linear
    uses: tuple[Use, ...]
    blocks: tuple[int, ...] = (0,)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--pin` and `--exclude` accept for it: those of its nodes and its weight."""
        return (*(u.node for u in self.uses), self.weight)

    @property
    def looked_up(self) -> bool:
        """Whether all its nodes look up rows of a table."""
        return self.linear.op_type == "Gather" and all(u.output for u in self.uses)


@dataclass(frozen=True)
class Tie:
    """A table whose rows equal those of a layer, of this name: an embedding that is also the head."""

    table: Layer
    layer: str


@dataclass(frozen=True)
class Product:
    """A MatMul of two computed tensors, as in attention, that runs on integers if both are quantized."""

    node: str
    operands: tuple[str, str]
    output: str


@dataclass(frozen=True)
class Activation:
    """A tensor that a quantizer follows.

    feeds: tensors that carry its values into layers or products; empty for a fusion tensor.
    moved: tensors downstream of movement operators, requantized (exactly) so that their consumers fuse, too.
    parts: inputs of the Concat that produces it, if they have no other consumer; they are quantized in its stead.
    """

    tensor: str
    feeds: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def fusion(self) -> bool:
        return not self.feeds

    @property
    def stem(self) -> str:
        """The tensor that it branches from, else its own."""
        return self.tensor.removesuffix(BRANCH)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--pin` accepts."""
        return (self.tensor, self.stem)


def input_channels(linear: Linear) -> int:
    """Return the channels of the input, those of all groups."""
    return linear.group * linear.inputs // math.prod(linear.shape[2:])


def block_sizes(linear: Linear, offered: tuple[int, ...]) -> tuple[int, ...]:
    """Return those of the block sizes `offered` that divide a row, 0 if there is none; see `Layer.blocks`.

    Rows of several groups, and rows that do not lie in the weight as they are, have one scale.
    """
    count = linear.row_length
    plain = linear.group == 1 and not linear.axes and linear.axis in (0, len(linear.shape) - 1)
    return tuple(n for n in offered if n == 0 or (plain and n < count and count % n == 0)) or (0,)
