"""QuantizeLinear and DequantizeLinear around what was allocated, where the target fuses integer kernels.

    activation   a ─ QuantizeLinear ─ [Clip to 0..2^b-1] ─ DequantizeLinear ─ all that read a (BranchConsumers)
    weight       INT8 integers ─ DequantizeLinear (one scale per channel, zero point 0) ─ layer
    bias         INT32 integers ─ DequantizeLinear (weight scale x activation scale) ─ layer
    weights only INT8 integers ─ Cast ─ Mul by the scales ─ layer
                 scales of blocks ─ Gather ┘ one for each weight, at the number of its block

Invariants, each with its reason:

1. Activations are UINT8 whatever their width; fewer than 8 bits are a ceiling on the integers. Kernels fuse around it;
   UINT4 quantizers make ONNX Runtime refuse the model. Signed ones (INT8, zero point 0) are for TensorRT, which wants
   nothing between Q and DQ: their ceiling is a Clip before Q.
2. A Relu or Clip whose bounds the quantizer's saturation implies is removed: the integers are the same, and a clamp
   between convolution and quantizer would keep the convolution in float at widths under 8. A Min by a ceiling for each
   channel becomes a Min of the integers.
3. A tensor behind operators that only move values is quantized once more with the same scale and zero point, which
   changes no value; the operator and what reads it then fuse.
4. Every DequantizeLinear has an explicit zero point, of zeros for weights and biases: the integer Gemm wants it, and
   so does ONNX Runtime's ORT format, which cannot store a fusion around one without. ONNX asks for the shape of the
   scales; those of one shape share it.
5. Biases are rounded to the steps that integer kernels add them in, so that fused and unfused graphs give the same
   numbers; before that to half precision, so that PackVectors can store them in two bytes. TensorRT wants float ones.
6. Where activations stay in float, weights are multiplied out: that folds to a float weight when a session is made,
   which a DequantizeLinear does not.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.model.graph import CLAMPS
from rdoq_onnx.model.layers import Activation, Layer
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Tensor, Variable
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.block_numbers import BlockNumbers
from rdoq_onnx.passes.branch_consumers import join_branches
from rdoq_onnx.passes.correct_bias import add_to_bias
from rdoq_onnx.passes.zeros import Zeros

_ROUNDING = 1e-6
_Decoder = Zeros | BlockNumbers


@dataclass(frozen=True)
class QuantizedWeight:
    """A layer with its integers, int8 in the weight's shape, and its scales, float32 [units], or [units, B] of blocks.

    shift: what is added to each of the layer's outputs, by its bias where it has one.
    """

    layer: Layer
    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    shift: NDArray[np.float64]


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Quantize the weights and activations given. Assumes a normalized model; leaves no float copy of a weight.

    folds: whether the runtime folds the Cast and Mul of weights whose inputs stay in float; else all weights are behind
    a DequantizeLinear. measured: tensors that stay in the graph under their names: if a quantizer does the work of the
    clamp that produces one, its DequantizeLinear produces it.
    """

    weights: Sequence[QuantizedWeight]
    activations: Sequence[tuple[Activation, Affine]]
    integer_biases: bool = True
    folds: bool = True
    measured: Collection[str] = ()

    def __call__(self, model: ModelProto) -> ModelProto:
        def insert(graph: Graph) -> None:
            nodes = {n.name: n for n in graph.nodes}
            fed = {f for activation, _ in self.activations for f in activation.feeds}
            zeros, numbers = Zeros(graph), BlockNumbers(graph)
            for weight in self.weights:
                meets_integers = any(use.data in fed for use in weight.layer.uses)
                _quantize_weight(graph, weight, nodes, zeros if meets_integers or not self.folds else numbers)
            tensors = graph.tensors()
            for activation, quantizer in self.activations:
                _quantize_activation(graph, activation, quantizer, tensors, self.measured)
            if self.integer_biases:
                for weight in self.weights:
                    for use in weight.layer.uses:
                        _quantize_bias(graph, nodes[use.node], weight, zeros)
            join_branches(graph)

        return surgeon.edit(model, insert)


def _quantize_weight(graph: Graph, weight: QuantizedWeight, nodes: dict[str, Node], decoder: _Decoder) -> None:
    """decoder: `Zeros` where the weight meets quantized activations, which an integer kernel could use."""
    layer = weight.layer
    stem = layer.weight
    stored = _initializer(graph, f"{stem}_quantized", weight.integers)
    if isinstance(decoder, Zeros):
        zero_point = decoder.like(weight.integers, len(weight.scales))
        inputs = [stored, _initializer(graph, f"{stem}_scale", weight.scales), zero_point]
        attrs = {"axis": layer.linear.axis}
        decoded = surgeon.append(graph, "DequantizeLinear", inputs, f"{stem}_DequantizeLinear", attrs=attrs)
    else:
        scales = decoder.scales(layer.linear, weight.scales, f"{stem}_scale")
        numbers = surgeon.append(graph, "Cast", [stored], f"{stem}_Cast", attrs={"to": TensorProto.FLOAT})
        decoded = surgeon.append(graph, "Mul", [numbers, scales], f"{stem}_Mul")
    for use in layer.uses:
        nodes[use.node].inputs[layer.linear.weight_side] = decoded
        if weight.shift.any():
            add_to_bias(graph, nodes[use.node], weight.shift, layer.linear.weight_side)


def _quantize_bias(graph: Graph, node: Node, weight: QuantizedWeight, zeros: Zeros) -> None:
    """Store the bias of a Conv or Gemm as its integer kernel adds it, where data, bias and what reads it allow."""
    source = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    bias = surgeon.values(node.inputs[2]) if node.op in ("Conv", "Gemm") and len(node.inputs) > 2 else None
    plain = node.attrs.get("alpha", 1.0) == 1.0 and node.attrs.get("beta", 1.0) == 1.0
    if bias is None or bias.shape != weight.scales.shape or not plain:
        return
    if source is None or source.op != "DequantizeLinear":
        return
    if node.op == "Conv" and not any(n.op == "QuantizeLinear" for n in node.outputs[0].outputs):
        return  # it stays in float, and would decode its bias at each inference
    weight_scale, activation_scale = node.inputs[1].inputs[0].inputs[1], source.inputs[1]
    steps = weight.scales * np.asarray(surgeon.values(activation_scale))
    with np.errstate(over="ignore"):
        half = bias.astype(np.float16).astype(np.float32)
    # In float32, as the decode of PackVectors divides.
    integers = np.rint(np.where(np.isfinite(half), half, bias.astype(np.float32)) / steps)
    if np.abs(integers).max(initial=0) >= 2**31:
        return
    stem = node.inputs[2].name
    scale = surgeon.append(graph, "Mul", [weight_scale, activation_scale], f"{stem}_scale")
    stored = _initializer(graph, f"{stem}_quantized", integers.astype(np.int32))
    inputs = [stored, scale, zeros.like(stored.values, len(integers))]
    node.inputs[2] = surgeon.append(graph, "DequantizeLinear", inputs, f"{stem}_DequantizeLinear", attrs={"axis": 0})


def _quantize_activation(
    graph: Graph, activation: Activation, quantizer: Affine, tensors: dict[str, Tensor], measured: Collection[str]
) -> None:
    byte = np.int8 if quantizer.signed else np.uint8
    codes = (
        _initializer(graph, f"{activation.tensor}_scale", np.array(quantizer.scale, np.float32)),
        _initializer(graph, f"{activation.tensor}_zero_point", np.array(quantizer.zero_point, byte)),
    )
    made = activation.parts or (activation.tensor,)
    again: dict[str, NDArray[np.uint8] | None] = dict.fromkeys(activation.moved)
    if activation.parts:
        joined = {t.name for t in tensors[activation.tensor].inputs[0].inputs}
        # What is joined beside the parts has a quantizer of its own, which may reach further.
        highest = _highest(quantizer) if joined - set(activation.parts) else None
        again = {activation.tensor: highest} | again
    for name in made:
        source, highest = _without_clamps(graph, tensors[name], quantizer)
        decoded = _insert(graph, source, quantizer, codes, highest)
        if name in measured and source is not tensors[name]:
            decoded.name, tensors[name].name = name, surgeon.fresh(graph, name)
    for name, highest in again.items():
        _insert(graph, tensors[name], quantizer, codes, highest)


def _insert(
    graph: Graph,
    tensor: Tensor,
    quantizer: Affine,
    codes: tuple[Constant, Constant],
    highest: NDArray[np.uint8] | None,
) -> Tensor:
    """Q, a ceiling on the integers where `highest` (one, or one a channel) leaves some of the 256 out, and DQ."""

    def build(source: Tensor) -> Tensor:
        stem = source.name
        if highest is not None and _clips_before(quantizer):
            bounds = [
                _initializer(graph, f"{stem}_{n}", np.array(v, np.float32))
                for n, v in zip(("least", "greatest"), quantizer.range, strict=True)
            ]
            source = surgeon.append(graph, "Clip", [source, *bounds], f"{stem}_Clip", like=tensor)
        q = surgeon.append(graph, "QuantizeLinear", [source, *codes], f"{stem}_QuantizeLinear")
        if highest is not None and not quantizer.signed and highest.min() < 255:
            top = _initializer(graph, f"{stem}_highest", highest)
            if highest.ndim:
                q = surgeon.append(graph, "Min", [q, top], f"{stem}_Min")
            else:
                q = surgeon.append(graph, "Clip", [q, Variable(""), top], f"{stem}_Clip")
        return surgeon.append(graph, "DequantizeLinear", [q, *codes], f"{stem}_DequantizeLinear", like=tensor)

    return surgeon.insert_after(graph, tensor, build, outputs=False)


def _clips_before(quantizer: Affine) -> bool:
    """Whether values are clipped in float: nothing may stand behind a signed QuantizeLinear, which reaches further."""
    return quantizer.signed and quantizer.high < 127


def _highest(quantizer: Affine) -> NDArray[np.uint8]:
    return np.array(quantizer.high, np.uint8)


def _without_clamps(graph: Graph, tensor: Tensor, quantizer: Affine) -> tuple[Tensor, NDArray[np.uint8]]:
    """The tensor to quantize in place of `tensor`, before the clamps that the quantizer does the work of.

    Also returns the highest integer: a Min by a ceiling for each channel becomes a Min of the integers, which gives
    the same as rounding is monotone.
    """
    highest = _highest(quantizer)
    saturates = quantizer.signed and not _clips_before(quantizer)
    least, greatest = (-128 * quantizer.scale, 127 * quantizer.scale) if saturates else quantizer.range
    while tensor.inputs and tensor.inputs[0].op in CLAMPS and not any(tensor is t for t in graph.outputs):
        clamp: Node = tensor.inputs[0]
        source: Tensor = clamp.inputs[0]
        ceiling = surgeon.values(clamp.inputs[1]) if clamp.op == "Min" and len(clamp.inputs) == 2 else None
        low, high = (-np.inf, np.inf) if ceiling is not None else _bounds(clamp)
        if least < low or greatest > high * (1 + _ROUNDING) or len(source.outputs) > 1:
            break
        if ceiling is not None and quantizer.signed:
            break
        if not surgeon.bypass(graph, clamp):
            break
        tensor = source
        if ceiling is not None:
            levels = np.rint(ceiling / np.float32(quantizer.scale)) + quantizer.zero_point
            highest = np.minimum(highest, np.clip(levels, quantizer.low, quantizer.high)).astype(np.uint8)
    return tensor, highest if highest.min() < quantizer.high else _highest(quantizer)


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
