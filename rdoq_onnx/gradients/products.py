"""Adjoints of matrix products, convolutions and pooling."""

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from rdoq_onnx.gradients.tape import Array, Grads, Tape, attribute, rule
from rdoq_onnx.gradients.window import Window, kernel_adjoint
from rdoq_onnx.model.linear import split_padding


def _transposed(tape: Tape, name: str) -> str:
    """Swap the last two axes, at once if `name` is a constant."""
    value = tape.value(name)
    if value is not None:
        return tape.constant(np.swapaxes(value, -1, -2), name)
    rank = len(tape.shapes[name])
    return tape.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


def _flat_product(tape: Tape, g: str, weight: str, batch: Sequence[int]) -> str:
    """Append g Wᵀ, g [*batch, columns], without a copy of the matrix W, which may be large."""
    rows, columns = tape.shapes[weight]
    product = tape.op("Gemm", tape.reshape(g, [-1, columns]), weight, transB=1)
    return tape.reshape(product, [*batch, rows])


@rule("MatMul")
def _matmul(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    (a, b), g = node.input, str(grads[0])
    shape_a, shape_b = tape.shapes[a], tape.shapes[b]
    if min(len(shape_a), len(shape_b)) < 2:
        return NotImplemented
    batch = tape.shapes[node.output[0]][:-2]
    left = right = None
    if tape.wants(a):
        if tape.detached(b) and len(shape_b) == 2:
            product = _flat_product(tape, g, b, tape.shapes[node.output[0]][:-1])
        else:
            product = tape.op("MatMul", g, _transposed(tape, b))
        left = tape.unbroadcast(product, (*batch, *shape_a[-2:]), a)
    if tape.wants(b):
        if len(shape_b) == 2:
            rows = (tape.reshape(v, [-1, shape[-1]]) for v, shape in ((a, shape_a), (g, (*batch, shape_b[-1]))))
            right = tape.op("Gemm", *rows, transA=1)
        else:
            product = tape.op("MatMul", _transposed(tape, a), g)
            right = tape.unbroadcast(product, (*batch, *shape_b[-2:]), b)
    return [left, right]


@rule("Gemm")
def _gemm(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    (a, b), g = node.input[:2], str(grads[0])
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    turn_a, turn_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    result: list[str | None] = [None] * len(node.input)
    if tape.wants(a):  # adj(A) = op(B) G^T if A is transposed, else G op(B)^T
        pair = (b, g) if turn_a else (g, b)
        turns = {"transA": turn_b, "transB": 1} if turn_a else {"transA": 0, "transB": 1 - turn_b}
        result[0] = tape.op("Gemm", *pair, alpha=alpha, **turns)
    if tape.wants(b):
        pair = (g, a) if turn_b else (a, g)
        turns = {"transA": 1, "transB": turn_a} if turn_b else {"transA": 1 - turn_a, "transB": 0}
        result[1] = tape.op("Gemm", *pair, alpha=alpha, **turns)
    if len(result) > 2 and tape.wants(node.input[2]):
        result[2] = tape.unbroadcast(tape.scale(g, beta, a), tape.shapes[node.output[0]], node.input[2])
    return result


@rule("Conv")
def _conv(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    (x, weight), g, group = node.input[:2], str(grads[0]), attribute(node, "group", 1)
    shape, w = tape.shapes[weight], tape.value(weight)
    window = Window.of(node, tape.shapes[x][2:], tape.shapes[node.output[0]][2:], shape[2:])
    result: list[str | None] = [None] * len(node.input)
    if tape.wants(x):
        result[0] = (
            _conv_transposed(tape, g, weight, group, window)
            if w is None
            else _conv_adjoint(tape, g, x, w, group, window)
        )
    if tape.wants(weight):
        result[1] = kernel_adjoint(tape, g, x, shape, group, window)
    if len(result) > 2 and tape.wants(node.input[2]):
        rest = [k for k in range(len(shape)) if k != 1]
        result[2] = tape.reshape(tape.sum(g, rest), tape.shapes[node.input[2]])
    return result


def _conv_adjoint(tape: Tape, g: str, x: str, w: Array, group: int, window: Window) -> str:
    """Append the adjoint of a Conv: a Conv for stride 1, else a ConvTranspose.

    Strided depthwise convolutions are the exception: there a Conv over inserted zeros is faster in ONNX Runtime.
    """
    begin = [r - b for r, b in zip(window.reach, window.begins, strict=True)]
    end = [
        n - (t - 1) * s - 1 - b + r
        for n, t, s, b, r in zip(window.source, window.target, window.strides, begin, window.reach, strict=True)
    ]
    if min(*begin, *end) < 0 or (max(window.strides) > 1 and group != w.shape[0]):
        return _conv_transposed(tape, g, tape.constant(w, x), group, window)
    if max(window.strides) > 1:
        ones = np.ones((w.shape[0], 1, *[1] * len(window.kernel)))
        g = tape.op("ConvTranspose", g, tape.constant(ones, x), group=w.shape[0], strides=window.strides)
    m, spatial = w.shape[0], w.shape[2:]
    swapped = w.reshape(group, m // group, -1, *spatial).swapaxes(1, 2).reshape(-1, m // group, *spatial)
    kernel = tape.constant(np.flip(swapped, tuple(range(2, w.ndim))), x)
    return tape.op(
        "Conv", g, kernel, group=group, kernel_shape=window.kernel, dilations=window.dilations, pads=[*begin, *end]
    )


def _conv_transposed(tape: Tape, g: str, weight: str, group: int, window: Window) -> str:
    ends = [
        (t - 1) * s + r + 1 - b - n
        for n, t, s, b, r in zip(window.source, window.target, window.strides, window.begins, window.reach, strict=True)
    ]
    return tape.op(
        "ConvTranspose",
        g,
        weight,
        group=group,
        kernel_shape=window.kernel,
        strides=window.strides,
        dilations=window.dilations,
        pads=[*window.begins, *(max(e, 0) for e in ends)],
        output_padding=[max(-e, 0) for e in ends],
    )


@rule("ConvTranspose")
def _conv_transpose(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Append a Conv with the same weights, the adjoint of a ConvTranspose, and of that Conv the kernel's adjoint."""
    (x, weight), kernel = node.input[:2], tape.shapes[node.input[1]]
    if len(node.input) > 2 and tape.wants(node.input[2]):
        return NotImplemented
    rank = len(kernel) - 2
    source, target = tape.shapes[x][2:], tape.shapes[node.output[0]][2:]
    strides = attribute(node, "strides") or [1] * rank
    dilations = attribute(node, "dilations") or [1] * rank
    auto_pad, begins = attribute(node, "auto_pad", "NOTSET"), (attribute(node, "pads") or [0] * 2 * rank)[:rank]
    if auto_pad.startswith("SAME") or attribute(node, "output_shape"):
        extra = attribute(node, "output_padding") or [0] * rank
        begins = [
            split_padding(max(s * (n - 1) + (k - 1) * d + 1 + e - t, 0), auto_pad)[0]
            for s, n, k, d, e, t in zip(strides, source, kernel[2:], dilations, extra, target, strict=True)
        ]
    ends = [
        s * (n - 1) + (k - 1) * d + 1 - b - t
        for s, n, k, d, b, t in zip(strides, source, kernel[2:], dilations, begins, target, strict=True)
    ]
    group = attribute(node, "group", 1)
    result: list[str | None] = [None] * len(node.input)
    if tape.wants(weight):
        window = Window(target, source, kernel[2:], tuple(strides), tuple(dilations), tuple(begins))
        result[1] = kernel_adjoint(tape, x, str(grads[0]), kernel, group, window)
    if tape.wants(x):
        g = tape.pad(str(grads[0]), [0] * len(kernel), [0, 0, *(min(e, 0) for e in ends)])
        result[0] = tape.op(
            "Conv",
            g,
            weight,
            group=group,
            kernel_shape=kernel[2:],
            strides=strides,
            dilations=dilations,
            pads=[*begins, *(max(e, 0) for e in ends)],
        )
    return result


@rule("AveragePool")
def _average_pool(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Divide by the number of elements per window, then append the adjoint of a depthwise Conv of ones."""
    x, shape = node.input[0], tape.shapes[node.input[0]]
    window = Window.of(node, shape[2:], tape.shapes[node.output[0]][2:], attribute(node, "kernel_shape"))
    size, counts, g = float(np.prod(window.kernel)), _coverage(window), str(grads[0])
    if attribute(node, "count_include_pad", 0):
        if attribute(node, "ceil_mode", 0):
            return NotImplemented
        counts = np.full_like(counts, size)
    if np.any(counts != size):
        g, size = tape.op("Mul", g, tape.constant(1 / counts, x)), 1.0
    ones = np.full((shape[1], 1, *window.kernel), 1 / size)
    return [_conv_adjoint(tape, g, x, ones, shape[1], window)]


def _coverage(window: Window) -> Array:
    """Return how many elements of each pooling window are not padding."""
    coverage = np.ones((), np.float64)
    for n, t, k, s, d, b in zip(
        window.source, window.target, window.kernel, window.strides, window.dilations, window.begins, strict=True
    ):
        places = np.arange(t)[:, None] * s + np.arange(k) * d - b
        coverage = np.multiply.outer(coverage, np.sum((places >= 0) & (places < n), axis=1))
    return coverage


@rule("MaxPool")
def _max_pool(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Scatter each window's adjoint to its largest element, whose index MaxPool itself outputs."""
    x, g = node.input[0], grads[0]
    if attribute(node, "storage_order", 0):
        return NotImplemented
    if len(node.output) == 1:
        node.output.append(tape.name(f"{node.output[0]}/places"))
    places = tape.reshape(node.output[1], [-1])
    zeros = tape.op("HardSigmoid", tape.reshape(x, [-1]), alpha=0.0, beta=0.0)  # flat: no blocked layout to convert
    sums = tape.op("ScatterElements", zeros, places, tape.reshape(g, [-1]), reduction="add")
    return [tape.reshape(sums, tape.shapes[x])]
