"""QuantizeLinear and DequantizeLinear around what was allocated, where ONNX Runtime fuses integer kernels.

    activation   a ─ QuantizeLinear ─ [Clip to 0..2^b-1] ─ DequantizeLinear ─ all that read a
    weight       INT8 integers ─ DequantizeLinear (one scale per channel, zero point 0) ─ layer

Invariants, each with its reason:

1. Activations are UINT8 whatever their width; fewer than 8 bits are a Clip on the integers. Kernels fuse around it;
   UINT4 quantizers make ONNX Runtime refuse the model.
2. A Relu or Clip whose bounds the quantizer's saturation implies is removed: the integers are the same, and a clamp
   between convolution and quantizer would keep the convolution in float at widths under 8. A Min by a ceiling for each
   channel becomes a Min of the integers.
3. A tensor behind operators that only move values is quantized once more with the same scale and zero point, which
   changes no value; the operator and what reads it then fuse.
4. Weights have an explicit zero point of 0: the integer Gemm wants it.
5. Weights are bounded by the caller (|q| <= 64): u8 x s8 kernels of CPUs without VNNI add two products in 16 bits, and
   2 x 255 x 64 still fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from rdoq_onnx import surgeon
from rdoq_onnx.analysis import CLAMPS, Activation, Layer
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.correct_bias import add_to_bias
from rdoq_onnx.quantizer import Affine
from rdoq_onnx.surgeon import Constant, Graph, Node, Tensor, Variable

_ROUNDING = 1e-6


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer with its integers, int8 in the weight's shape, and its scales, float32 [units].

    shift: what is added to each of the layer's outputs, by its bias where it has one.
    """

    layer: Layer
    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    shift: NDArray[np.float64]


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Quantize the weights and activations given. Assumes a normalized model; leaves no float copy of a weight."""

    weights: Sequence[QuantizedWeight]
    activations: Sequence[tuple[Activation, Affine]]

    def __call__(self, model: ModelProto) -> ModelProto:
        def insert(graph: Graph) -> None:
            nodes = {n.name: n for n in graph.nodes}
            for weight in self.weights:
                _quantize_weight(graph, weight, nodes)
            tensors = graph.tensors()
            for activation, quantizer in self.activations:
                _quantize_activation(graph, activation, quantizer, tensors)

        return surgeon.edit(model, insert)


def _quantize_weight(graph: Graph, weight: QuantizedWeight, nodes: dict[str, Node]) -> None:
    layer = weight.layer
    stem = layer.weight
    decoded = surgeon.append(
        graph,
        "DequantizeLinear",
        [
            _initializer(graph, f"{stem}_quantized", weight.integers),
            _initializer(graph, f"{stem}_scale", weight.scales),
            _initializer(graph, f"{stem}_zero_point", np.zeros(weight.scales.shape, np.int8)),
        ],
        f"{stem}_DequantizeLinear",
        attrs={"axis": layer.linear.axis},
    )
    for use in layer.uses:
        nodes[use.node].inputs[layer.linear.weight_side] = decoded
        if weight.shift.any():
            add_to_bias(graph, nodes[use.node], weight.shift, layer.linear.weight_side)


def _quantize_activation(
    graph: Graph, activation: Activation, quantizer: Affine, tensors: dict[str, Tensor]
) -> None:
    scale = _initializer(graph, f"{activation.tensor}_scale", np.array(quantizer.scale, np.float32))
    zero_point = _initializer(graph, f"{activation.tensor}_zero_point", np.array(quantizer.zero_point, np.uint8))
    made = activation.parts or (activation.tensor,)
    again: dict[str, NDArray[np.uint8] | None] = dict.fromkeys(activation.moved)
    if activation.parts:
        joined = {t.name for t in tensors[activation.tensor].inputs[0].inputs}
        # What is joined beside the parts has a quantizer of its own, which may reach further.
        highest = np.array(quantizer.high, np.uint8) if joined - set(activation.parts) else None
        again = {activation.tensor: highest} | again
    for name in made:
        source, highest = _without_clamps(graph, tensors[name], quantizer)
        _insert(graph, source, scale, zero_point, highest)
    for name, highest in again.items():
        _insert(graph, tensors[name], scale, zero_point, highest)


def _insert(
    graph: Graph, tensor: Tensor, scale: Constant, zero_point: Constant, highest: NDArray[np.uint8] | None
) -> None:
    """Q, a ceiling on the integers where `highest` (one, or one a channel) leaves some of the 256 out, and DQ."""

    def build(source: Tensor) -> Tensor:
        q = surgeon.append(graph, "QuantizeLinear", [source, scale, zero_point], f"{source.name}_QuantizeLinear")
        if highest is not None and highest.min() < 255:
            top = _initializer(graph, f"{source.name}_highest", highest)
            if highest.ndim:
                q = surgeon.append(graph, "Min", [q, top], f"{source.name}_Min")
            else:
                q = surgeon.append(graph, "Clip", [q, Variable(""), top], f"{source.name}_Clip")
        return surgeon.append(
            graph, "DequantizeLinear", [q, scale, zero_point], f"{source.name}_DequantizeLinear", like=tensor
        )

    surgeon.insert_after(graph, tensor, build, outputs=False)


def _without_clamps(graph: Graph, tensor: Tensor, quantizer: Affine) -> tuple[Tensor, NDArray[np.uint8]]:
    """The tensor to quantize in place of `tensor`, before the clamps that the quantizer does the work of.

    Also returns the highest integer: a Min by a ceiling for each channel becomes a Min of the integers, which gives
    the same as rounding is monotone.
    """
    highest = np.array(quantizer.high, np.uint8)
    while tensor.inputs and tensor.inputs[0].op in CLAMPS and not any(tensor is t for t in graph.outputs):
        clamp: Node = tensor.inputs[0]
        source: Tensor = clamp.inputs[0]
        ceiling = surgeon.values(clamp.inputs[1]) if clamp.op == "Min" and len(clamp.inputs) == 2 else None
        low, high = (-np.inf, np.inf) if ceiling is not None else _bounds(clamp)
        least, greatest = quantizer.range
        if least < low or greatest > high * (1 + _ROUNDING) or len(source.outputs) > 1:
            break
        if not surgeon.bypass(graph, clamp):
            break
        tensor = source
        if ceiling is not None:
            levels = np.rint(ceiling / np.float32(quantizer.scale)) + quantizer.zero_point
            highest = np.minimum(highest, np.clip(levels, quantizer.low, quantizer.high)).astype(np.uint8)
    return tensor, highest if highest.min() < quantizer.high else np.array(quantizer.high, np.uint8)


def _bounds(clamp: Node) -> tuple[float, float]:
    """What a Relu or Clip bounds its values to; bounds that are computed, and a Min of other kind, imply nothing."""
    if clamp.op == "Relu":
        return 0.0, np.inf
    if clamp.op == "Min":
        return np.inf, -np.inf
    given = [surgeon.values(t) if t.name else None for t in clamp.inputs[1:]]
    absent = [not t.name for t in clamp.inputs[1:]]
    while len(given) < 2:
        given.append(None)
        absent.append(True)
    low = -np.inf if absent[0] else np.inf if given[0] is None else float(given[0])
    high = np.inf if absent[1] else -np.inf if given[1] is None else float(given[1])
    return low, high


def _initializer(graph: Graph, stem: str, value: NDArray[np.generic]) -> Constant:
    return surgeon.constant(surgeon.fresh(graph, stem), value)
