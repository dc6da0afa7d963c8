"""The layers and activations of a network: plain data that passes and analysis share."""

from dataclasses import dataclass

from rdoq_onnx.model.linear import Linear

BRANCH = "/quantized"  # behind the tensor's name
LAYER_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUSION_BITS = 8


@dataclass(frozen=True)
class Use:
    """One node that applies a layer's weight. linear: how it unfolds its data, with strides and pads of its own."""

    node: str
    data: str
    output: str
    linear: Linear


@dataclass(frozen=True)
class Layer:
    """A weight, the nodes that apply it, and how it becomes rows. Named after its first node."""

    name: str
    weight: str
    linear: Linear
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Activation:
    """A tensor that a quantizer follows.

    feeds: the tensors that reach a layer with this tensor's values; empty for a fusion tensor.
    moved: tensors behind operators that only move its values, quantized once more (exactly) so that what reads them
        fuses too.
    parts: the tensors that a Concat joins into it, where no one else reads them; they are quantized in its stead.
    """

    tensor: str
    feeds: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def fusion(self) -> bool:
        return not self.feeds

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--pin` knows it by: its own, and that of the tensor that it is a branch of."""
        return (self.tensor, self.tensor.removesuffix(BRANCH))
