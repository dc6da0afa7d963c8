"""The sliding window of a convolution or pooling, and the adjoint of a convolution's kernel.

    y_o[p] = Σ_ct w_oc[t] x_c[s p + d t - b],    ∂L/∂w_oc[t] = Σ_np g_no[p] x_nc[s p + d t - b]

with strides s, dilations d and padding b: a product of g with what each tap of the kernel sees of x.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from onnx import NodeProto

from rdoq_onnx.gradients.tape import Tape, attribute


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution or pooling, per spatial axis."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]  # padding before the first element

    @property
    def reach(self) -> tuple[int, ...]:
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True))

    @classmethod
    def of(cls, node: NodeProto, source: Sequence[int], target: Sequence[int], kernel: Sequence[int]) -> "Window":
        rank = len(kernel)
        strides = tuple(attribute(node, "strides") or [1] * rank)
        dilations = tuple(attribute(node, "dilations") or [1] * rank)
        begins = list(attribute(node, "pads") or [0] * 2 * rank)[:rank]
        mode = attribute(node, "auto_pad", "NOTSET")
        if mode.startswith("SAME"):
            wide = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
            needed = [max((t - 1) * s + w - n, 0) for t, s, w, n in zip(target, strides, wide, source, strict=True)]
            begins = [(n + (mode == "SAME_LOWER")) // 2 for n in needed]
        return cls(tuple(source), tuple(target), tuple(kernel), strides, dilations, tuple(begins))


def kernel_adjoint(tape: Tape, g: str, x: str, kernel: Sequence[int], group: int, window: Window) -> str:
    """Append the adjoint of the kernel, of shape `kernel`, of a convolution of x, from the adjoint g of its output.

    The convolution is forward, or the adjoint of one that is: one of x and g is a tensor of the forward pass.
    """
    (outputs, width), taps = kernel[:2], list(product(*map(range, window.kernel)))
    seen = _seen(tape, x, taps, window)
    if width == 1 and outputs == group:
        rest = [0, *range(2, len(kernel))]
        sums = [tape.sum(tape.op("Mul", each, g), rest) for each in seen]
        return tape.reshape(sums[0] if len(sums) == 1 else tape.op("Concat", *sums, axis=2), kernel)
    samples, places = tape.shapes[x if x in tape.shapes else g][0], prod(window.target)
    rows = tape.reshape(g, [samples, group, outputs // group, places])
    # Of one tap at a time: a MatMul of few columns is faster than to join what all taps see.
    columns = [tape.reshape(each, [samples, group, width, places]) for each in seen]
    parts = [tape.op("MatMul", rows, tape.op("Transpose", each, perm=[0, 1, 3, 2])) for each in columns]
    sums = [tape.reshape(tape.sum(part, [0]), [outputs, width, 1]) for part in parts]
    return tape.reshape(sums[0] if len(sums) == 1 else tape.op("Concat", *sums, axis=2), kernel)


def _seen(tape: Tape, x: str, taps: Sequence[Sequence[int]], window: Window) -> list[str]:
    """Append what each tap sees of x, [samples, channels, *target]."""
    axes = range(2, 2 + len(window.kernel))
    after = [
        max((t - 1) * s + r + 1 - b - n, 0)
        for n, t, s, b, r in zip(window.source, window.target, window.strides, window.begins, window.reach, strict=True)
    ]
    padded = tape.pad(x, [0, 0, *window.begins], [0, 0, *after])
    if len(taps) == 1 and window.source == window.target and padded == x:
        return [x]
    slices = []
    for tap in taps:
        starts = [k * d for k, d in zip(tap, window.dilations, strict=True)]
        ends = [b + (t - 1) * s + 1 for b, t, s in zip(starts, window.target, window.strides, strict=True)]
        bounds = (tape.constant(v) for v in (starts, ends, list(axes), window.strides))
        slices.append(tape.op("Slice", padded, *bounds))
    return slices
