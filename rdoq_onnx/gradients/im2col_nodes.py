"""Graph nodes for the layer products of `model/linear.py`: X, g and g Xᵀ, computed where the tensors are.

X is the output of the convolution itself, applied to each channel separately with kernels that are 1 at one tap and 0
elsewhere. The operator thus handles strides, pads and dilations in any number of dimensions. Channels move to axis 0
for this, so that one convolution with a constant kernel serves all of them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.gradients.tape import Tape
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.linear import Linear


def unfold(tape: Tape, linear: Linear, x: str, samples: int) -> str:
    """Append X [samples, G, K, P], as `Linear.unfold` computes it."""
    shape = tape.shapes[x]
    if linear.op_type == "Gemm":
        rows, inputs = (transpose(tape, x, 1, 0), shape[0]) if linear.trans_a else (x, shape[-1])
        return _columns(tape, tape.scale(rows, linear.alpha, x), inputs, samples)
    if linear.op_type == "MatMul":
        return _matrices(tape, linear, x, samples)
    taps = math.prod(linear.shape[2:])
    patches = x if _pointwise(linear) else _patches(tape, linear, x)
    return _per_sample(tape, patches, shape[0], linear.group, shape[1] // linear.group * taps, samples)


def outputs(tape: Tape, linear: Linear, z: str, samples: int) -> str:
    """Append the layer's output or its adjoint, [samples, G, O, P], as `Linear.outputs` computes it."""
    shape = tape.shapes[z]
    if linear.op_type == "Gemm":
        return _columns(tape, z, shape[-1], samples)
    if linear.op_type == "MatMul":
        return _matrices(tape, linear, z, samples)
    return _per_sample(tape, z, shape[0], linear.group, shape[1] // linear.group, samples)


def gradient(tape: Tape, layer: Layer, adjoints: Mapping[str, str], mean: NDArray[Any], samples: int) -> str:
    """Append g (X - E[x])ᵀ summed over all uses of `layer`, [samples, G, O, K]; mean [G, K]."""
    terms = []
    for use in layer.uses:
        x = unfold(tape, use.linear, use.data, samples)
        g = outputs(tape, use.linear, adjoints[use.output], samples)
        product = tape.op("MatMul", g, transpose(tape, x, 0, 1, 3, 2))
        shift = tape.op("Mul", tape.sum(g, [-1]), tape.constant(mean[:, None, :], use.data))
        terms.append(tape.op("Sub", product, shift))
    return terms[0] if len(terms) == 1 else tape.op("Sum", *terms)


def transpose(tape: Tape, value: str, *order: int) -> str:
    """Append a Transpose with the permutation `order`."""
    return tape.op("Transpose", value, perm=list(order))


def _columns(tape: Tape, rows: str, width: int, samples: int) -> str:
    """[samples·P, width] -> [samples, 1, width, P]."""
    return transpose(tape, tape.reshape(rows, [samples, 1, -1, width]), 0, 1, 3, 2)


def _matrices(tape: Tape, linear: Linear, value: str, samples: int) -> str:
    """Arrange an input or output of a MatMul as [samples, 1, inputs, P]."""
    shape = tape.shapes[value]
    if linear.weight_side == 1:
        return _columns(tape, value, shape[-1], samples)
    stacked = tape.reshape(value, [samples, -1, *shape[-2:]])
    return tape.reshape(transpose(tape, stacked, 0, 2, 1, 3), [samples, 1, shape[-2], -1])


def _pointwise(linear: Linear) -> bool:
    """Whether the unfolded input of a convolution is the input itself."""
    offsets = (*linear.pads, *linear.output_padding, *linear.output_shape, *(s - 1 for s in linear.strides))
    return math.prod(linear.shape[2:]) == 1 and not any(offsets)


def _patches(tape: Tape, linear: Linear, x: str) -> str:
    """[N, C, ...] -> [N·C, taps, ...]: the input of each kernel tap, for each channel."""
    shape, kernel = tape.shapes[x], linear.shape[2:]
    taps = math.prod(kernel)
    ends = (taps, 1) if linear.op_type == "Conv" else (1, taps)
    one_tap_each = np.eye(taps).reshape(*ends, *kernel)
    settings: dict[str, Any] = {
        "strides": linear.strides,
        "dilations": linear.dilations,
        "auto_pad": linear.auto_pad,
        "pads": linear.pads if linear.auto_pad == "NOTSET" else (),
        "output_padding": linear.output_padding,
        "output_shape": linear.output_shape,
    }
    channels = tape.reshape(x, [shape[0] * shape[1], 1, *shape[2:]])
    attributes = {name: value for name, value in settings.items() if value}
    return tape.op(linear.op_type, channels, tape.constant(one_tap_each, x), **attributes)


def _per_sample(tape: Tape, blocks: str, rows: int, groups: int, inputs: int, samples: int) -> str:
    """[rows, G·inputs, P] -> [samples, G, inputs, rows / samples·P]."""
    if rows == samples:
        return tape.reshape(blocks, [samples, groups, inputs, -1])
    parts = tape.reshape(blocks, [samples, rows // samples, groups, inputs, -1])
    return tape.reshape(transpose(tape, parts, 0, 2, 3, 1, 4), [samples, groups, inputs, -1])
