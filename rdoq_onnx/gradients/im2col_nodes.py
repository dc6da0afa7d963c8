"""`linear.py` as nodes of a graph: X, g and g Xᵀ of a layer, where the tensors are.

A convolution is linear in its weights, so that X is what the operator itself makes of each channel alone with kernels
that are 1 at one tap and 0 elsewhere: strides, pads and dilations stay the operator's own affair, in any number of
dimensions. Channels go to axis 0 for that, and one product of a constant with all of them is left.
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
    """X [samples, G, K, P] as `Linear.unfold` gives it."""
    shape = tape.shapes[x]
    if linear.op_type == "Gemm":
        rows, inputs = (turned(tape, x, 1, 0), shape[0]) if linear.trans_a else (x, shape[-1])
        return _columns(tape, tape.scale(rows, linear.alpha, x), inputs, samples)
    if linear.op_type == "MatMul":
        return _matrices(tape, linear, x, samples)
    taps = math.prod(linear.shape[2:])
    patches = x if _pointwise(linear) else _patches(tape, linear, x)
    return _per_sample(tape, patches, shape[0], linear.group, shape[1] // linear.group * taps, samples)


def outputs(tape: Tape, linear: Linear, z: str, samples: int) -> str:
    """The layer's output or its adjoint, [samples, G, O, P], as `Linear.outputs` gives it."""
    shape = tape.shapes[z]
    if linear.op_type == "Gemm":
        return _columns(tape, z, shape[-1], samples)
    if linear.op_type == "MatMul":
        return _matrices(tape, linear, z, samples)
    return _per_sample(tape, z, shape[0], linear.group, shape[1] // linear.group, samples)


def gradient(
    tape: Tape, layer: Layer, adjoints: Mapping[str, str], mean: NDArray[Any], samples: int
) -> str:
    """g (X - E[x])ᵀ over all uses of `layer`, [samples, G, O, K]; mean [G, K]."""
    terms = []
    for use in layer.uses:
        x = unfold(tape, use.linear, use.data, samples)
        g = outputs(tape, use.linear, adjoints[use.output], samples)
        product = tape.op("MatMul", g, turned(tape, x, 0, 1, 3, 2))
        shift = tape.op("Mul", tape.sum(g, [-1]), tape.constant(mean[:, None, :], use.data))
        terms.append(tape.op("Sub", product, shift))
    return terms[0] if len(terms) == 1 else tape.op("Sum", *terms)


def turned(tape: Tape, value: str, *order: int) -> str:
    """Axes in another order."""
    return tape.op("Transpose", value, perm=list(order))


def _columns(tape: Tape, rows: str, width: int, samples: int) -> str:
    """[samples·P, width] -> [samples, 1, width, P]."""
    return turned(tape, tape.reshape(rows, [samples, 1, -1, width]), 0, 1, 3, 2)


def _matrices(tape: Tape, linear: Linear, value: str, samples: int) -> str:
    """What goes into a MatMul, or comes out of it."""
    shape = tape.shapes[value]
    if linear.weight_side == 1:
        return _columns(tape, value, shape[-1], samples)
    stacked = tape.reshape(value, [samples, -1, *shape[-2:]])
    return tape.reshape(turned(tape, stacked, 0, 2, 1, 3), [samples, 1, shape[-2], -1])


def _pointwise(linear: Linear) -> bool:
    """Whether a convolution sees its input as it is."""
    moved = (*linear.pads, *linear.output_padding, *linear.output_shape, *(s - 1 for s in linear.strides))
    return math.prod(linear.shape[2:]) == 1 and not any(moved)


def _patches(tape: Tape, linear: Linear, x: str) -> str:
    """[N, C, ...] -> [N·C, taps, ...]: what each tap of the kernel sees of each channel."""
    shape, kernel = tape.shapes[x], linear.shape[2:]
    taps = math.prod(kernel)
    ends = (taps, 1) if linear.op_type == "Conv" else (1, taps)
    one_tap_each = np.eye(taps).reshape(*ends, *kernel)
    given: dict[str, Any] = {
        "strides": linear.strides, "dilations": linear.dilations, "auto_pad": linear.auto_pad,
        "pads": linear.pads if linear.auto_pad == "NOTSET" else (),
        "output_padding": linear.output_padding, "output_shape": linear.output_shape,
    }  # fmt: skip
    channels = tape.reshape(x, [shape[0] * shape[1], 1, *shape[2:]])
    attributes = {name: value for name, value in given.items() if value}
    return tape.op(linear.op_type, channels, tape.constant(one_tap_each, x), **attributes)


def _per_sample(tape: Tape, blocks: str, rows: int, groups: int, inputs: int, samples: int) -> str:
    """[rows, G·inputs, P] -> [samples, G, inputs, rows / samples·P]."""
    if rows == samples:
        return tape.reshape(blocks, [samples, groups, inputs, -1])
    parts = tape.reshape(blocks, [samples, rows // samples, groups, inputs, -1])
    return tape.reshape(turned(tape, parts, 0, 2, 3, 1, 4), [samples, groups, inputs, -1])
