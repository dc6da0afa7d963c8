"""Adjoints of elementwise operators and normalizations.

A mask is a HardSigmoid of huge slope, applied to the node's *output*. Measured in ONNX Runtime, Sign takes six times as
long and Where with a broadcast scalar twenty times; and a Relu whose input has no other consumer stays fused with its
Conv.
"""

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from rdoq_onnx.gradients.tape import Grads, Tape, attribute, only, rule

STEEP = 2.0**100  # slope of a mask: exact in float32, and no tensor holds values near its inverse


@rule("Identity", "Dropout", "Floor", "Ceil", "Round", "Sign", "Cast")
def _pass_on(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    if node.op_type in ("Identity", "Dropout"):
        return only(node, str(grads[0]))
    if node.op_type == "Round" and tape.straight:
        return only(node, str(grads[0]))
    if node.op_type == "Cast":
        return [tape.op("Cast", str(grads[0]), to=tape.dtypes[node.input[0]])]
    return [None]


@rule("Add", "Sum", "Sub", "Mul", "Div")
def _arithmetic(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    g, y, shape = str(grads[0]), node.output[0], tape.shapes[node.output[0]]

    def scalar(index: int) -> str:
        """Of a factor or divisor that all elements share: inner products are cheaper than products and their sum."""
        if node.op_type == "Mul":
            return tape.inner(g, node.input[1 - index], node.input[index])
        return tape.op("Neg", tape.op("Div", tape.inner(g, y, node.input[index]), node.input[index]))

    def partial(index: int) -> str:
        if node.op_type == "Mul":
            return tape.op("Mul", g, node.input[1 - index])
        if node.op_type == "Div":
            quotient = tape.op("Div", g, node.input[1])
            return quotient if index == 0 else tape.op("Neg", tape.op("Mul", quotient, y))
        return tape.op("Neg", g) if node.op_type == "Sub" and index == 1 else g

    def adjoint(index: int) -> str:
        name = node.input[index]
        alone = node.op_type in ("Mul", "Div") and np.prod(tape.shapes[name]) == 1 < np.prod(shape)
        if alone and (node.op_type == "Mul" or index == 1) and tape.shapes[node.input[1 - index]] == shape:
            return scalar(index)
        return tape.unbroadcast(partial(index), shape, name)

    return [adjoint(i) if tape.wants(name) else None for i, name in enumerate(node.input)]


@rule("Neg", "Relu", "Sigmoid", "Tanh", "Exp", "Sqrt", "HardSigmoid", "HardSwish", "LeakyRelu")
def _unary(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    g, x, y = str(grads[0]), node.input[0], node.output[0]
    if node.op_type == "Neg":
        return [tape.op("Neg", g)]
    if y in tape.masked:
        return [g]
    return [tape.op("Mul", g, _SLOPES[node.op_type](tape, node, x, y))]


def positive(tape: Tape, value: str) -> str:
    """Append a mask that is 1 where value > 0 and 0 elsewhere."""
    return tape.op("HardSigmoid", value, alpha=STEEP, beta=0.0)


def _inside(tape: Tape, y: str, low: float, high: float) -> str:
    """Append a mask that is 1 where low < y < high and 0 elsewhere, for y already clipped to [low, high]."""
    above = y if low == 0 else tape.op("Sub", y, tape.constant(low, y))
    below = tape.op("Sub", tape.constant(high, y), y)
    return positive(tape, tape.op("Mul", above, below))


def _hard_swish_slope(tape: Tape, x: str) -> str:
    gate = tape.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    return tape.op("Add", gate, tape.op("Mul", tape.scale(_inside(tape, gate, 0, 1), 1 / 6, x), x))


def _leaky_slope(tape: Tape, node: NodeProto, x: str) -> str:
    alpha = attribute(node, "alpha", 0.01)
    return tape.op("Add", tape.scale(positive(tape, x), 1 - alpha, x), tape.constant(alpha, x))


def _sqrt_slope(tape: Tape, y: str) -> str:
    """Append 1 / 2y, or 0 where y is 0: the magnitude spectrum of silence must not give NaN."""
    return tape.op("Div", tape.scale(positive(tape, y), 0.5, y), tape.op("Max", y, tape.constant(1e-12, y)))


def _one_minus(tape: Tape, value: str, like: str) -> str:
    return tape.op("Sub", tape.constant(1, like), value)


_SLOPES: dict[str, Callable[[Tape, NodeProto, str, str], str]] = {
    "Relu": lambda t, n, x, y: positive(t, y),
    "Sigmoid": lambda t, n, x, y: t.op("Mul", y, _one_minus(t, y, y)),
    "Tanh": lambda t, n, x, y: _one_minus(t, t.op("Mul", y, y), y),
    "Exp": lambda t, n, x, y: y,
    "Sqrt": lambda t, n, x, y: _sqrt_slope(t, y),
    "HardSigmoid": lambda t, n, x, y: t.scale(_inside(t, y, 0, 1), attribute(n, "alpha", 0.2), y),
    "HardSwish": lambda t, n, x, y: _hard_swish_slope(t, x),
    "LeakyRelu": lambda t, n, x, y: _leaky_slope(t, n, x),
}


@rule("Min")
def _min(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Handle a constant ceiling; leave all else to onnx-ad."""
    if len(node.input) != 2 or tape.value(node.input[1]) is None or tape.wants(node.input[1]):
        return NotImplemented
    y = node.output[0]
    mask = positive(tape, tape.op("Sub", node.input[1], y))
    return [tape.unbroadcast(tape.op("Mul", grads[0], mask), tape.shapes[y], node.input[0]), None]


@rule("Clip")
def _clip(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    y = node.output[0]
    bounds = [tape.value(name) if name else None for name in [*node.input, "", ""][1:3]]
    if any(name and bound is None for name, bound in zip(node.input[1:], bounds, strict=False)):
        return NotImplemented
    low, high = (None if b is None else float(b) for b in bounds)
    if low is not None and high is not None:
        mask = _inside(tape, y, low, high)
    elif low is not None:
        mask = positive(tape, y if low == 0 else tape.op("Sub", y, tape.constant(low, y)))
    elif high is not None:
        mask = positive(tape, tape.op("Sub", tape.constant(high, y), y))
    else:
        return only(node, str(grads[0]))
    return only(node, tape.op("Mul", str(grads[0]), mask))


@rule("Softmax", "LogSoftmax")
def _softmax(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    g, y, axes = str(grads[0]), node.output[0], [attribute(node, "axis", -1)]
    if node.op_type == "LogSoftmax":
        return [tape.op("Sub", g, tape.op("Mul", tape.op("Exp", y), tape.sum(g, axes)))]
    weighted = tape.op("Mul", g, y)
    return [tape.op("Sub", weighted, tape.op("Mul", y, tape.sum(weighted, axes)))]


@rule("LayerNormalization")
def _layer_norm(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """With x^ = (x - mean) r and r = 1/sigma: adj(x) = r (h - mean(h) - x^ mean(h x^)), h = adj(y) * scale."""
    x, shape = node.input[0], tape.shapes[node.input[0]]
    if any(grads[1:]) or any(tape.wants(name) for name in node.input[1:]):
        return NotImplemented
    axes = list(range(attribute(node, "axis", -1) % len(shape), len(shape)))
    centred = tape.op("Sub", x, tape.mean(x, axes))
    variance = tape.mean(tape.op("Mul", centred, centred), axes)
    sigma = tape.op("Sqrt", tape.op("Add", variance, tape.constant(attribute(node, "epsilon", 1e-5), x)))
    normal = tape.op("Div", centred, sigma)
    h = tape.op("Mul", str(grads[0]), node.input[1])
    along = tape.op("Mul", normal, tape.mean(tape.op("Mul", h, normal), axes))
    return only(node, tape.op("Div", tape.op("Sub", tape.op("Sub", h, tape.mean(h, axes)), along), sigma))


@rule("BatchNormalization")
def _batch_norm(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    scale, variance = tape.value(node.input[1]), tape.value(node.input[4])
    if scale is None or variance is None or attribute(node, "training_mode", 0):
        return NotImplemented
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    rank = len(tape.shapes[node.input[0]])
    shaped = tape.constant(factor.reshape(-1, *[1] * (rank - 2)), node.input[0])
    return only(node, tape.op("Mul", str(grads[0]), shaped))
