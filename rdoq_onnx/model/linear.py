"""A weighted layer as one matrix product per group: z = W X.

Conv, ConvTranspose, Gemm and MatMul are all linear in their weights. Unfolding the data into X (im2col) turns them into
the same operator, and everything the method needs into matrix products:

    output       z = W X          [N, G, O, P]
    perturbation Δz = ΔW X        (supplement, Sect. 1: the input of the Add after the layer's output)
    gradient     ∂(vᵀy)/∂W = g Xᵀ [N, G, O, K], so that ⟨g, op(x, ΔW)⟩ = ⟨g Xᵀ, ΔW⟩ for every ΔW at once

N samples, G groups, O output channels per group, K weights per output channel, P positions. The bias is not included.
A unit owns one scale in the emitted file: it is an index along the weight's channel axis. Its weights form a row.
Weights that no product unfolds, such as a table whose rows are looked up, have units along `axes`, and rows likewise.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Linear:
    """How one operator unfolds: its type, its weight's shape and the relevant attributes.

    op_type: "Conv", "ConvTranspose", "Gemm" or "MatMul"; any other with `axes`.
    weight_side: which of the operator's two inputs is the weight (0 only for MatMul).
    axes: ascending axes of the weight along which units lie; empty for the four operators, which have one.
    """

    op_type: str
    shape: tuple[int, ...]
    weight_side: int = 1
    group: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    trans_a: bool = False
    trans_b: bool = False
    alpha: float = 1.0
    axes: tuple[int, ...] = ()

    @property
    def matrix(self) -> "Linear":
        """Only what determines how the weight unfolds into rows, without where these are applied."""
        return replace(self, strides=(), dilations=(), pads=(), auto_pad="NOTSET", output_padding=(), output_shape=())

    @property
    def axis(self) -> int:
        """The channel axis of the weight, as in DequantizeLinear's `axis`."""
        if self.axes:
            return self.axes[0]
        if self.op_type == "Conv" or (self.op_type == "Gemm" and self.trans_b):
            return 0
        if self.op_type == "MatMul" and self.weight_side == 0:
            return len(self.shape) - 2
        return 1 if self.op_type != "MatMul" else len(self.shape) - 1

    @property
    def channels(self) -> int:
        return math.prod(self.shape[k] for k in self._units)

    @property
    def row_length(self) -> int:
        """The weights of a unit."""
        return math.prod(self.shape) // self.channels

    @property
    def inputs(self) -> int:
        """K. A unit of a grouped ConvTranspose has weights in all groups."""
        return self.row_length // self._shared

    def positions(self, elements: int) -> int:
        """P for an output of `elements` elements."""
        return elements // (self.channels * self._shared)

    @property
    def _units(self) -> tuple[int, ...]:
        return self.axes or (self.axis,)

    @property
    def _shared(self) -> int:
        """The number of groups that share a unit."""
        return self.group if self.op_type == "ConvTranspose" else 1

    def rows(self, weight: FloatArray) -> FloatArray:
        """Weight tensor -> [units, weights per unit]."""
        return np.moveaxis(weight, self._units, range(len(self._units))).reshape(self.channels, -1)

    def tensor(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `rows`."""
        units = self._units
        rest = (n for k, n in enumerate(self.shape) if k not in units)
        apart = rows.reshape(*(self.shape[k] for k in units), *rest)
        return np.ascontiguousarray(np.moveaxis(apart, range(len(units)), units))

    def grouped(self, rows: NDArray[Any]) -> NDArray[Any]:
        """[..., units, weights per unit] -> [..., G, O, K]."""
        lead = rows.shape[:-2]
        if self.op_type == "ConvTranspose":
            return np.swapaxes(rows.reshape(*lead, self.channels, self.group, -1), -3, -2)
        return rows.reshape(*lead, self.group, self.channels // self.group, -1)

    def ungrouped(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `grouped`."""
        lead = blocks.shape[:-3]
        if self.op_type == "ConvTranspose":
            blocks = np.swapaxes(blocks, -3, -2)
        return blocks.reshape(*lead, self.channels, -1)

    def block(self, unit: int) -> tuple[int | slice, int]:
        """Index of a unit's outputs in [G, O, ...]; a grouped ConvTranspose shares its scales between groups."""
        if self.op_type == "ConvTranspose":
            return slice(None), unit
        return divmod(unit, self.channels // self.group)

    def unfold(self, x: FloatArray, samples: int) -> FloatArray:
        """The layer's data input -> X [samples, G, K, P].

        Axis 0 of `x` is a multiple of `samples`; its rows are ordered by sample.
        """
        if self.op_type == "Gemm":
            rows = x.T if self.trans_a else x
            return (self.alpha * rows.reshape(samples, 1, -1, rows.shape[-1])).swapaxes(-1, -2)
        if self.op_type == "MatMul" and self.weight_side == 1:
            return x.reshape(samples, 1, -1, x.shape[-1]).swapaxes(-1, -2)
        if self.op_type == "MatMul":
            stacked = x.reshape(samples, -1, x.shape[-2], x.shape[-1])
            return np.moveaxis(stacked, 1, 2).reshape(samples, 1, x.shape[-2], -1)
        return _per_sample(self._windows(x), samples)

    def outputs(self, z: FloatArray, samples: int) -> FloatArray:
        """The layer's output (or its adjoint) -> [samples, G, O, P], positions ordered as in `unfold`."""
        if self.op_type in ("Conv", "ConvTranspose"):
            blocks = z.reshape(z.shape[0], self.group, z.shape[1] // self.group, -1)
            return _per_sample(blocks, samples)
        if self.op_type == "MatMul" and self.weight_side == 0:
            stacked = z.reshape(samples, -1, z.shape[-2], z.shape[-1])
            return np.moveaxis(stacked, 1, 2).reshape(samples, 1, z.shape[-2], -1)
        return z.reshape(samples, 1, -1, z.shape[-1]).swapaxes(-1, -2)

    def refold(self, blocks: FloatArray, like: tuple[int, ...]) -> FloatArray:
        """The inverse of `outputs`: [samples, G, O, P] -> a tensor of the shape `like`."""
        samples = blocks.shape[0]
        if self.op_type in ("Conv", "ConvTranspose"):
            repeat = like[0] // samples
            parts = blocks.reshape(*blocks.shape[:3], repeat, -1)
            return np.moveaxis(parts, 3, 1).reshape(like)
        if self.op_type == "MatMul" and self.weight_side == 0:
            parts = blocks.reshape(samples, like[-2], -1, like[-1])
            return np.moveaxis(parts, 2, 1).reshape(like)
        return blocks[:, 0].swapaxes(-1, -2).reshape(like)

    def _windows(self, x: FloatArray) -> FloatArray:
        """[N, C, *spatial] -> [N, G, K, P]."""
        spatial = len(self.shape) - 2
        kernel = self.shape[2:]
        dilations = self.dilations or (1,) * spatial
        strides = self.strides or (1,) * spatial
        if self.op_type == "ConvTranspose":
            x = _stretch(x, strides)
            pads = self._transposed_pads(x.shape[2:], kernel, dilations, strides)
            strides = (1,) * spatial
        else:
            pads = self._pads(x.shape[2:], kernel, dilations, strides)
        x = _pad(x, pads)
        extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
        axes = tuple(range(2, 2 + spatial))
        view = sliding_window_view(x, extent, axis=axes)
        every = [slice(None)] * 2
        view = view[(*every, *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]
        if self.op_type == "ConvTranspose":
            view = np.flip(view, tuple(range(-spatial, 0)))
        view = np.moveaxis(view, tuple(range(-spatial, 0)), axes)
        return view.reshape(x.shape[0], self.group, x.shape[1] // self.group * math.prod(kernel), -1)

    def _pads(
        self, size: tuple[int, ...], kernel: tuple[int, ...], dilations: tuple[int, ...], strides: tuple[int, ...]
    ) -> list[tuple[int, int]]:
        if self.auto_pad == "VALID":
            return [(0, 0)] * len(kernel)
        if self.auto_pad == "NOTSET":
            pads = self.pads or (0,) * (2 * len(kernel))
            return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
        result = []
        for n, k, d, s in zip(size, kernel, dilations, strides, strict=True):
            total = max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
            result.append(split_padding(total, self.auto_pad))
        return result

    def _transposed_pads(
        self,
        stretched: tuple[int, ...],
        kernel: tuple[int, ...],
        dilations: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> list[tuple[int, int]]:
        """Padding of the stretched input; negative where the operator crops its output."""
        extra = self.output_padding or (0,) * len(kernel)
        pads = self.pads or (0,) * (2 * len(kernel))
        result = []
        for axis, (n, k, d, s, e) in enumerate(zip(stretched, kernel, dilations, strides, extra, strict=True)):
            begin, end = pads[axis], pads[axis + len(kernel)]
            if self.output_shape or self.auto_pad.startswith("SAME"):
                wanted = self.output_shape[axis] if self.output_shape else ((n - 1) // s + 1) * s
                total = n + d * (k - 1) + e - wanted
                begin, end = split_padding(max(total, 0), self.auto_pad)
                e += max(-total, 0)
            result.append((d * (k - 1) - begin, d * (k - 1) - end + e))
        return result


def _per_sample(blocks: FloatArray, samples: int) -> FloatArray:
    """[N·r, G, K, P] -> [N, G, K, r·P]."""
    if blocks.shape[0] == samples:
        return blocks
    _, groups, k, positions = blocks.shape
    parts = blocks.reshape(samples, -1, groups, k, positions)
    return np.moveaxis(parts, 1, 3).reshape(samples, groups, k, -1)


def _stretch(x: FloatArray, strides: tuple[int, ...]) -> FloatArray:
    """Insert zeros between positions, as a transposed convolution does to its input."""
    if all(s == 1 for s in strides):
        return x
    size = [s * (n - 1) + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    out = np.zeros((*x.shape[:2], *size), x.dtype)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    return out


def _pad(x: FloatArray, pads: list[tuple[int, int]]) -> FloatArray:
    if any(p for pair in pads for p in pair):
        x = np.pad(x, [(0, 0), (0, 0), *((max(b, 0), max(e, 0)) for b, e in pads)])
        crop = tuple(slice(max(-b, 0), n - max(-e, 0)) for (b, e), n in zip(pads, x.shape[2:], strict=True))
        x = x[(slice(None), slice(None), *crop)]
    return x


def split_padding(total: int, auto_pad: str) -> tuple[int, int]:
    """Split padding (or cropping) into before and after; an odd element goes to the end only with SAME_UPPER."""
    small, large = total // 2, total - total // 2
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)
