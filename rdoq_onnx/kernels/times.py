"""How long ONNX Runtime takes for a layer in float and on integers, from its sizes alone.

Nanoseconds on one core with AVX-512 VNNI, fitted to profiles of PP-LCNet, MobileNetV3 and PP-OCR in ONNX Runtime 1.32;
never measured during a run, which must give the same bytes on every machine. What matters is their ratio:

- A dense integer convolution multiplies three times as fast as one in float, but gathers each position of a kernel
  larger than 1 x 1, whatever the number of channels, which ruins the first layer of most networks.
- A depthwise one multiplies about as fast as in float, but one at a time in channels beyond a multiple of 16.
- Between the two a tensor changes its type and its layout, a pass over memory each.
"""

import math

from rdoq_onnx.model.linear import Linear

CHANGE = 0.35  # per element of a tensor between a float and an integer kernel
NODE = 2000.0  # each further node: a pass over a small tensor takes no less
_BLOCK = 16  # channels of a float register
_FLOAT_DENSE, _FLOAT_FEW, _FLOAT_DEPTHWISE, _FLOAT_MATRIX = 130, 42, 65, 60  # multiplications per ns
_INTEGER_DENSE, _INTEGER_DEPTHWISE, _INTEGER_MATRIX = 520, 57, 200
_GATHERED = 1.5  # per position of the kernel and of the output
_REQUANTIZED = 0.1  # per output
_POSITION = 6.0  # of a depthwise convolution
_REMAINDER = 0.9  # per multiplication in a channel beyond a whole number of registers
_OVERHEAD = 2000.0  # of an integer kernel over one in float


def float_time(linear: Linear, outputs: int) -> float:
    """Return the time of a layer in float that computes `outputs` elements per sample."""
    work = _work(linear, outputs)
    if not _is_convolution(linear):
        return work / _FLOAT_MATRIX
    if _is_depthwise(linear):
        return work / _FLOAT_DEPTHWISE
    inputs, channels = linear.shape[1], linear.channels
    speed = _FLOAT_FEW if inputs < _BLOCK else _FLOAT_DENSE
    return work / speed * math.ceil(channels / _BLOCK) * _BLOCK / channels


def integer_time(linear: Linear, outputs: int) -> float:
    """Return the time of a layer on integers; a ConvTranspose has no such kernel and decodes its input."""
    work = _work(linear, outputs)
    if linear.op_type == "ConvTranspose":
        return float_time(linear, outputs) + NODE
    if not _is_convolution(linear):
        return work / _INTEGER_MATRIX + _OVERHEAD
    kernel = math.prod(linear.shape[2:])
    if _is_depthwise(linear):
        positions = linear.positions(outputs)
        remainder = linear.channels % _BLOCK * kernel * positions * _REMAINDER
        return work / _INTEGER_DEPTHWISE + positions * _POSITION + remainder + _OVERHEAD
    gathered = kernel * linear.positions(outputs) * _GATHERED if kernel > 1 else 0.0
    return work / _INTEGER_DENSE + gathered + outputs * _REQUANTIZED + _OVERHEAD


def _work(linear: Linear, outputs: int) -> float:
    """The multiplications per sample."""
    return float(linear.positions(outputs) * math.prod(linear.shape))


def _is_convolution(linear: Linear) -> bool:
    return linear.op_type in ("Conv", "ConvTranspose")


def _is_depthwise(linear: Linear) -> bool:
    return linear.group > 1 and linear.shape[1] == 1
