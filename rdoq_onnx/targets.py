"""What each deployment runtime asks of a quantized file: the one table that all steps read.

- onnxruntime: its integer kernels multiply unsigned activations by signed weights. On CPUs without VNNI they add two
  products in 16 bits, and 2 x 255 x 64 still fits, so |q| <= 64 is exact everywhere. They hold biases as INT32.
  Whatever operators compute from constants is folded when a session is made.
- openvino: its kernels without VNNI have the same 16 bit sums. It does not read INT2, and folds Cast, Concat and Gather
  of weights, but no bit operations. A quantizer between a convolution and a residual Add is dropped: the Add becomes
  part of the convolution (OpenVINO 2026.4). INT8 ─ Cast ─ Mul in a quantized model is not folded, though a GRU or LSTM
  wants its weights constant; through INT32 it is. The body of a Scan reads no computed tensor from around it.
- tensorrt: INT8 around a zero point of 0 for activations and weights, nothing between QuantizeLinear and
  DequantizeLinear, weights behind nothing but a DequantizeLinear, one scale for all of a ConvTranspose, float biases
  (NVIDIA TensorRT documentation, "Working with Quantized Types"; tensorrt_rules.py checks them all).
"""

from dataclasses import dataclass
from typing import Literal

Storage = Literal["packed", "native", "int8"]
TargetName = Literal["onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    symmetric: activations are INT8 with a zero point of 0; else UINT8 with any. weight_limit: greatest magnitude of
    the integers of weights beside quantized activations. integer_biases: biases are INT32 in steps of activation scale
    x weight scale; else float. storages: how weights may be stored, the default first. int2: whether INT2 is read.
    one_scale: types of layers that have one scale for all channels of their weights, and stay in float as channels
    have scales of their own here. sums: a convolution takes the residual Add behind it in, in float: what stands
    between the two is not quantized. folds: what is computed from constants is folded; else weights are behind a
    DequantizeLinear even where their inputs stay in float. saturates: its integer kernels may saturate as those of ONNX
    Runtime do, whose default level then has to give what BASIC gives. weight_only: layers that the search does not
    reach may have integer weights beside float data. closed: types of nodes whose bodies do not read what the graph
    around them computes, if only from constants.
    """

    name: TargetName
    symmetric: bool
    weight_limit: int
    integer_biases: bool
    storages: tuple[Storage, ...]
    int2: bool
    one_scale: tuple[str, ...] = ()
    sums: bool = False
    folds: bool = True
    saturates: bool = True
    weight_only: bool = True
    closed: tuple[str, ...] = ()

    @property
    def widest(self) -> int:
        """The widest weights beside quantized activations, in bits."""
        return (2 * self.weight_limit - 1).bit_length()


# The first ONNX Runtime that runs all that is emitted: INT2, and Min of UINT8, which holds ceilings for each channel.
COMPLETE = (1, 24)
# The first that casts INT4.
CASTS_INT4 = (1, 23)

TARGETS: dict[TargetName, Target] = {
    t.name: t
    for t in (
        Target("onnxruntime", False, 64, True, ("packed", "native", "int8"), True),
        Target("openvino", False, 64, True, ("native", "int8"), False, sums=True, closed=("Scan",)),
        Target("tensorrt", True, 127, False, ("int8",), False, ("ConvTranspose",), folds=False, saturates=False,
               weight_only=False),
    )
}  # fmt: skip
