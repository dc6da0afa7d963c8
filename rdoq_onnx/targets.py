"""The rules of each deployment runtime for a quantized file, the one table that all steps read.

- onnxruntime: integer kernels multiply unsigned activations by signed weights. On CPUs without VNNI they add two
  products in 16 bits, and 2 x 255 x 64 still fits, so |q| <= 64 is exact everywhere. Biases are INT32. Operators on
  constants are folded when a session is created. A MatMul of two UINT8 tensors has an integer kernel, exact with any
  zero points; one of UINT8 and INT8 would saturate.
- openvino: kernels without VNNI have the same 16-bit sums. It does not read INT2, and folds Cast, Concat and Gather of
  weights, but no bitwise operators. It drops a quantizer between a convolution and a residual Add, since it fuses the
  Add into the convolution (OpenVINO 2026.4). It does not fold INT8 ─ Cast ─ Mul in a quantized model, though a GRU or
  LSTM needs constant weights; with a Cast through INT32 it does. The body of a Scan cannot read computed tensors from
  outside. It may read a shape in front of a convolution's bias, which then goes wrong: all files keep it from that
  (passes/opaque_shapes.py), as nobody knows where a file will run.
- tensorrt: INT8 with a zero point of 0 for activations and weights, nothing between QuantizeLinear and
  DequantizeLinear, weights directly behind a DequantizeLinear, one scale for the whole weight of a ConvTranspose, float
  biases (NVIDIA TensorRT documentation, "Working with Quantized Types"; tensorrt_rules.py checks them all).
"""

from dataclasses import dataclass
from typing import Literal

Storage = Literal["packed", "native", "int8", "nbits"]
TargetName = Literal["onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True)
class Target:
    """The rules of one runtime.

    symmetric: activations are INT8 with a zero point of 0; else UINT8 with any zero point. weight_limit: greatest
    magnitude of weight integers beside quantized activations. integer_biases: biases are INT32 with scale = activation
    scale x weight scale; else float. storages: supported storages, the default first. int2: whether INT2 is supported.
    one_scale: layer types restricted to one scale per weight; they stay in float, since weights have per-channel scales
    here. sums: a convolution fuses the residual Add behind it in float, so the tensor between them is not quantized.
    folds: operators on constants are folded; else weights are behind a DequantizeLinear even if the layer's data stay
    in float. saturates: its integer kernels may saturate like those of ONNX Runtime, whose default level must then
    agree with BASIC. weight_only: weights that no product unfolds may be integers beside float data. closed: node
    types whose bodies cannot read tensors computed in the outer graph, not even from constants. products: a MatMul of
    two UINT8 activations has an integer kernel. hard_swish: so has a product of two UINT8 tensors element by element,
    by which HardSwish is computed.
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
    products: bool = False
    hard_swish: bool = False

    @property
    def widest(self) -> int:
        """Return the greatest width of weights beside quantized activations, in bits."""
        return (2 * self.weight_limit - 1).bit_length()


# The first ONNX Runtime that runs everything emitted: INT2, and Min of UINT8 for per-channel ceilings.
COMPLETE = (1, 24)
# The first ONNX Runtime that casts INT4.
CASTS_INT4 = (1, 23)

TARGETS: dict[TargetName, Target] = {
    t.name: t
    for t in (
        Target(
            "onnxruntime", False, 64, True, ("packed", "native", "int8", "nbits"), True, products=True, hard_swish=True
        ),
        Target("openvino", False, 64, True, ("native", "int8"), False, sums=True, closed=("Scan",)),
        Target(
            "tensorrt",
            True,
            127,
            False,
            ("int8",),
            False,
            ("ConvTranspose",),
            folds=False,
            saturates=False,
            weight_only=False,
        ),
    )
}
