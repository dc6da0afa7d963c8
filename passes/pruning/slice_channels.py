"""Slice removed channels out of a graph: out of weights, scales, biases and all per-channel constants.

A sliced constant is a new initializer, so that other consumers keep the original; if there are none, it takes over the
name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor
from rdoq_onnx.passes.pruning.channel_rules import BROADCASTING
from rdoq_onnx.passes.zeros import Zeros

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """The mask of a tensor's kept channels, [C], and the number of axes after the channel axis."""

    stays: Mask
    trailing: int


def slice_channels(graph: Graph, cuts: Mapping[str, Cut], added: Mapping[str, NDArray[Any]]) -> None:
    """Keep only the channels in `cuts`, by tensor, after adding `added` to biases, by layer."""
    slicer = _Slicer(graph)
    for node in [n for n in graph.nodes if n.op in LAYER_TYPES]:
        slicer.slice_layer(node, cuts.get(node.inputs[0].name), cuts.get(node.outputs[0].name), added.get(node.name))
    for node in [n for n in graph.nodes if n.outputs[0].name in cuts]:
        slicer.slice_constants(node, cuts[node.outputs[0].name])
    slicer.take_over_names()
    for name, tensor in graph.tensors().items():
        if name in cuts and tensor.shape:
            axis = len(tensor.shape) - cuts[name].trailing - 1
            tensor.shape = [int(cuts[name].stays.sum()) if k == axis else n for k, n in enumerate(tensor.shape)]


class _Slicer:
    """Slices nodes in place, and tracks the constants and decoders it replaced."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._replaced: list[tuple[Constant, Constant]] = []
        self._weights: dict[str, Tensor] = {}
        self._zeros = Zeros(graph)

    def slice_layer(self, node: Node, inputs: Cut | None, outputs: Cut | None, added: NDArray[Any] | None) -> None:
        """Slice a layer to its kept inputs and outputs. added: [outputs] before slicing."""
        if added is not None and node.op == "MatMul":
            self._add_behind(node, added)
        by_output = node.op == "Conv" or node.attrs.get("transB", 0)
        masks = {} if outputs is None else {0 if by_output else 1: outputs.stays}
        if node.attrs.get("group", 1) > 1:  # a depthwise convolution: its weight has no input axis
            node.attrs["group"] = int(outputs.stays.sum()) if outputs else node.attrs["group"]
        elif inputs is not None:
            masks[1 if by_output else 0] = inputs.stays
        if masks:
            weight = node.inputs[1]
            # Layers that share a weight share its slice.
            if weight.name not in self._weights:
                self._weights[weight.name] = self._slice_weight(weight, masks)
            node.inputs[1] = self._weights[weight.name]
        if node.op != "MatMul":
            self._slice_bias(node, None if outputs is None else outputs.stays, added)

    def slice_constants(self, node: Node, cut: Cut) -> None:
        """Slice the constant operands of a broadcasting operator, and the target shape of a Reshape."""
        if node.op in BROADCASTING:
            for index, tensor in enumerate(node.inputs):
                node.inputs[index] = self._sliced(tensor, {-cut.trailing - 1: cut.stays})
        elif node.op == "Reshape":
            rows, columns = node.inputs[1].values
            if columns != -1:
                node.inputs[1] = self._put(node.inputs[1], np.array([rows, cut.stays.sum()], np.int64))

    def take_over_names(self) -> None:
        exposed = surgeon.exposed(self._graph)
        for old, new in self._replaced:
            if not old.outputs and id(old) not in exposed and new.outputs:
                unused = surgeon.fresh(self._graph, old.name)
                new.name, old.name = old.name, unused

    def _slice_weight(self, weight: Tensor, masks: Mapping[int, Mask]) -> Tensor:
        """Slice a constant, or the integers and scales of a decoded one, by the masks of each axis."""
        if isinstance(weight, Constant):
            return self._sliced(weight, masks)
        node: Node = weight.inputs[0]
        rank = _stored(weight).values.ndim
        if node.op == "DequantizeLinear":
            axis = node.attrs.get("axis", 1)
            scale_masks = {0: masks[axis]} if axis in masks else {}
        else:
            scale_masks = {axis - rank: mask for axis, mask in masks.items()}
        if node.op == "Mul" and node.inputs[1].inputs and node.inputs[1].inputs[0].op == "Gather":
            node.inputs = [self._slice_weight(node.inputs[0], masks), self._slice_blocks(node.inputs[1], masks)]
            weight.shape = None
            return weight
        scales = [self._sliced(t, scale_masks) for t in node.inputs[1:]]
        node.inputs = [self._slice_weight(node.inputs[0], masks), *scales]
        weight.shape = None
        return weight

    def _slice_blocks(self, factors: Tensor, masks: Mapping[int, Mask]) -> Tensor:
        """Slice scales of blocks [channels, B] or [B, channels], and the numbers of the blocks of the other axes."""
        gather: Node = factors.inputs[0]
        first = gather.attrs.get("axis", 0) == 1
        numbers: Constant = gather.inputs[1].inputs[0].inputs[0]
        channel = 0 if first else numbers.values.ndim
        others = {axis - (axis > channel): mask for axis, mask in masks.items() if axis != channel}
        gather.inputs[0] = self._sliced(gather.inputs[0], {int(not first): masks[channel]} if channel in masks else {})
        sliced = self._sliced(numbers, others)
        if sliced is not numbers:
            attrs, stem = {"to": onnx.TensorProto.INT32}, f"{numbers.name}_Cast"
            gather.inputs[1] = surgeon.append(self._graph, "Cast", [sliced], stem, attrs=attrs)
        factors.shape = None
        return factors

    def _slice_bias(self, node: Node, stays: Mask | None, added: NDArray[Any] | None) -> None:
        """Add what removed inputs contributed, creating a bias if there is none, then drop removed outputs."""
        old = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if added is None and (old is None or stays is None):
            return
        stored = None if old is None else _stored(old)
        total = np.zeros(1) if stored is None else stored.values.reshape(-1)
        total = total if added is None else total + added
        total = total if stays is None else total[stays]
        in_steps = added is not None and added.dtype == np.int64 if stored is None else stored.values.dtype == np.int32
        total = total.astype(np.int32 if in_steps else np.float32)
        if stored is None:
            new = surgeon.constant(surgeon.fresh(self._graph, f"{node.name}_bias"), total)
        else:
            new = self._put(stored, total)
        if not in_steps:
            node.inputs = [*node.inputs[:2], new]
            return
        scales = [t.inputs[0].inputs[1] for t in (node.inputs[1], node.inputs[0])]
        zeros = self._zeros.like(total, len(total))
        if old is not None:
            decoder: Node = old.inputs[0]
            decoder.inputs[1].inputs[0].inputs = scales
            decoder.inputs = [new, decoder.inputs[1], zeros]
            return
        scale = surgeon.append(self._graph, "Mul", scales, f"{new.name}_scale")
        inputs, stem = [new, scale, zeros], f"{new.name}_DequantizeLinear"
        decoded = surgeon.append(self._graph, "DequantizeLinear", inputs, stem, attrs={"axis": 0})
        node.inputs = [*node.inputs[:2], decoded]

    def _add_behind(self, node: Node, added: NDArray[np.float64]) -> None:
        """Add to the constant of the Add that is the only consumer of a MatMul."""
        adder: Node = node.outputs[0].outputs[0]
        index = next(k for k, t in enumerate(adder.inputs) if isinstance(t, Constant))
        old: Constant = adder.inputs[index]
        adder.inputs[index] = self._put(old, (old.values + added).astype(np.float32))

    def _sliced(self, tensor: Tensor, masks: Mapping[int, Mask]) -> Tensor:
        """Apply the mask of each axis (negative: from the last) where a constant has that axis in full."""
        value = whole = surgeon.values(tensor)
        if value is None or whole is None:
            return tensor
        for axis, stays in masks.items():
            if -value.ndim <= axis < value.ndim and value.shape[axis] == stays.size:
                value = np.compress(stays, value, axis)
        return tensor if value is whole else self._put(tensor, value)

    def _put(self, old: Constant, value: NDArray[Any]) -> Constant:
        new = surgeon.constant(surgeon.fresh(self._graph, old.name), np.ascontiguousarray(value))
        self._replaced.append((old, new))
        return new


def _stored(tensor: Tensor) -> Constant:
    return tensor if isinstance(tensor, Constant) else _stored(tensor.inputs[0].inputs[0])
