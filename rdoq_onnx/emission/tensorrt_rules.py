"""Check a file against TensorRT's published rules of explicit quantization; TensorRT itself needs a GPU.

Each rule names its source:

    [types]      developer guide, "Working with Quantized Types": symmetric; INT8, and INT4 for weight-only layers (FP8
                 and FP4, which this package never writes, are not covered)
    [explicit]   developer guide, "Explicit Quantization": pre-quantized weights sit behind a DequantizeLinear, and all
                 inputs of weighted operations are quantized
    [operator]   operator reference, "Quantize" and "Dequantize": float input; scales are build-time constants, one per
                 tensor or per channel; zero points are zeros
    [parser]     onnx-tensorrt, QuantDequantLinearHelper: no UINT8, positive scales, one per entry of the axis; no
                 per-channel scales for activations
    [operators]  onnx-tensorrt, docs/operators.md: integer types exist only as the result of quantization; no bitwise
                 operators
    [bias]       microsoft/onnxruntime#14229, onnx/onnx-tensorrt#850: DequantizeLinear takes no INT32
    [transposed] NVIDIA/TensorRT#2380: weights of ConvTranspose have one scale, or one per input channel (axis 0)
    [opset]      "ONNX Opset Guide" of TensorRT 11: opsets 9 to 25

A layer with a float weight counts as left in float. Not covered: bodies of If, Loop and Scan; whether TensorRT supports
the other operators; speed.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from rdoq_onnx.model import external
from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.sizes import weights_as_inputs

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_OPSETS = range(9, 26)


def violations(model: onnx.ModelProto) -> tuple[str, ...]:
    """List what TensorRT refuses or cannot run on integers, one line each: node, rule, fix; empty if nothing.

    Weights must be loaded: external data raises what onnx.numpy_helper raises.
    """
    rules = _Rules(model)
    lines = [*rules.opsets(), *rules.types(), *rules.parameters(), *rules.granularity(), *rules.neighbours()]
    return (*lines, *rules.weights(), *rules.biases(), *rules.placement())


class _Rules:
    """The rules, one method each, with the look-ups they share."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = Graph(model)
        self.stored = dict(self.graph.initializers)
        for node in self.graph.nodes:
            if node.op_type == "Constant" and (value := attribute(node, "value", None)) is not None:
                self.stored[node.output[0]] = value
        self.element_types: dict[str, int] = _element_types(model) | {
            name: t.data_type for name, t in self.stored.items()
        }
        self.layers = [n for n in self.graph.nodes if n.op_type in LAYER_TYPES]
        bias = {n.input[2] for n in self.layers if len(n.input) > 2}
        self.quantizers = [n for n in self.graph.nodes if n.op_type == "QuantizeLinear"]
        # A DequantizeLinear in front of a bias has a rule of its own.
        self.dequantizers = [n for n in self.graph.nodes if n.op_type == "DequantizeLinear" and n.output[0] not in bias]

    def opsets(self) -> Iterator[str]:
        """[opset]"""
        for entry in self.graph.opsets:
            if entry.domain in ("", "ai.onnx") and entry.version not in _OPSETS:
                yield f"model: opset {entry.version} is outside {_OPSETS[0]} to {_OPSETS[-1]}; convert the model"

    def types(self) -> Iterator[str]:
        """[types] [parser] [operator]"""
        for node in self.quantizers:
            source = self.element_types.get(node.input[0])
            if source is not None and source not in _FLOATS:
                yield _line(node, f"quantizes {_name(source)}", "quantize floats only")
            kind = self._quantized_type(node)
            if kind != TensorProto.INT8:
                yield _line(node, f"outputs {_name(kind)}", "use an INT8 zero point of 0")
        for node in self.dequantizers:
            source = self.element_types.get(node.input[0])
            weight_only = source == TensorProto.INT4 and self._is_weight(node)
            # The output of a QuantizeLinear is checked above.
            if source not in (None, TensorProto.INT8) and not weight_only and not self._behind_quantizer(node):
                yield _line(node, f"decodes {_name(source)}", "store INT8, or INT4 for weights beside float data")

    def parameters(self) -> Iterator[str]:
        """[operator] [parser] [types]"""
        # The nodes of a Q/DQ pair share their parameters; report only the first.
        users: dict[tuple[str, ...], NodeProto] = {}
        for node in (*self.quantizers, *self.dequantizers):
            users.setdefault(tuple(node.input[1:]), node)
        for node in users.values():
            scale = self.stored.get(node.input[1])
            if scale is None:
                yield _line(node, "has a scale that is computed", "store it as an initializer")
            elif scale.data_type != TensorProto.FLOAT:
                yield _line(node, f"has a {_name(scale.data_type)} scale", "store it as float32")
            elif not (_array(scale) > 0).all() or not np.isfinite(_array(scale)).all():
                yield _line(node, "has a scale that is not positive", "use a scale of 1 for channels of zeros")
            if len(node.input) > 2 and node.input[2]:
                zero_point = self.stored.get(node.input[2])
                if zero_point is None:
                    yield _line(node, "has a zero point that is computed", "store it as an initializer")
                elif _array(zero_point).any():
                    yield _line(node, "has a zero point other than 0", "quantize symmetrically")

    def granularity(self) -> Iterator[str]:
        """[parser] [operator] [transposed]"""
        for node in (*self.quantizers, *self.dequantizers):
            scale = self.stored.get(node.input[1])
            if scale is None or np.prod(scale.dims) == 1:
                continue
            if not self._is_weight(node):
                yield _line(node, "has per-channel scales for an activation", "use one for the tensor")
                continue
            data = self.stored.get(self._source(node))
            if len(scale.dims) != 1 or data is None:
                continue
            axis = attribute(node, "axis", 1) % len(data.dims)
            if data.dims[axis] != scale.dims[0]:
                yield _line(node, f"has {scale.dims[0]} scales for {data.dims[axis]} channels", "use one per channel")
            for layer, side in self._consuming_layers(node):
                expected = _channel_axis(layer, side, len(data.dims))
                if axis != expected:
                    fix = "use one scale" if layer.op_type == "ConvTranspose" else f"scale along axis {expected}"
                    yield _line(node, f"has scales along axis {axis} of the weight of {layer.op_type}", fix)

    def neighbours(self) -> Iterator[str]:
        """[operators]"""
        for node in self.quantizers:
            others = {n.op_type for n in self.graph.consumers.get(node.output[0], [])} - {"DequantizeLinear"}
            if node.output[0] in self.graph.outputs:
                yield _line(node, "makes a graph output of integers", "dequantize it")
            if others:
                yield _line(node, f"is read by {', '.join(sorted(others))}", "put DequantizeLinear right behind it")

    def weights(self) -> Iterator[str]:
        """[explicit] [operators]"""
        for node in self.dequantizers:
            if self._is_weight(node) and self._source(node) not in self.stored:
                producer = self.graph.producer[self._source(node)]
                yield _line(node, f"decodes weights computed by {producer.op_type}", "store INT8 weights")
            for consumer in self.graph.consumers.get(node.output[0], []) if self._is_weight(node) else []:
                if consumer.op_type in ("Transpose", "Reshape", "Concat", "Cast"):
                    yield _line(node, f"is followed by {consumer.op_type}", "store the weight as the layer reads it")

    def biases(self) -> Iterator[str]:
        """[bias]"""
        for layer in self.layers:
            bias = layer.input[2] if len(layer.input) > 2 else ""
            if not bias or bias not in self.graph.constants:
                continue
            kind = self.stored[bias].data_type if bias in self.stored else None
            if kind != TensorProto.FLOAT:
                origin = f"is {_name(kind)}" if kind else f"is computed by {self.graph.producer[bias].op_type}"
                yield _line(layer, f"has a bias that {origin}", "store it as float32")

    def placement(self) -> Iterator[str]:
        """[explicit] [types]"""
        for layer in self.layers if self.quantizers else []:
            sides = [side for side in (0, 1) if layer.input[side] in self.graph.constants]
            if len(sides) != 1:
                continue
            weight, data = (self._decoded_type(layer.input[side]) for side in (sides[0], 1 - sides[0]))
            if weight == TensorProto.INT4 and data is not None:
                yield _line(layer, "has INT4 weights and quantized data", "store INT8 weights")
            if weight == TensorProto.INT8 and data is None:
                yield _line(layer, "has INT8 weights and float data", "quantize both, or neither")

    def _quantized_type(self, node: NodeProto) -> int:
        if len(node.input) > 2 and node.input[2]:
            return self.element_types.get(node.input[2], 0)
        # ONNX's default; TensorRT would silently read it as INT8.
        return int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8

    def _behind_quantizer(self, node: NodeProto) -> bool:
        producer = self.graph.producer.get(node.input[0])
        return producer is not None and producer.op_type == "QuantizeLinear"

    def _is_weight(self, node: NodeProto) -> bool:
        return node.input[0] in self.graph.constants

    def _source(self, node: NodeProto) -> str:
        """Return the tensor that a weight's Q or DQ starts from: stored integers, or the floats that a Q reads."""
        return str(self.graph.producer[node.input[0]].input[0] if self._behind_quantizer(node) else node.input[0])

    def _consuming_layers(self, node: NodeProto) -> Iterator[tuple[NodeProto, int]]:
        for consumer in self.graph.consumers.get(node.output[0], []):
            if consumer.op_type in LAYER_TYPES:
                yield from ((consumer, side) for side in (0, 1) if consumer.input[side] == node.output[0])

    def _decoded_type(self, tensor: str) -> int | None:
        """Return the integer type behind a dequantized tensor, looking through movement operators; else None."""
        producer = self.graph.producer.get(self.graph.root(tensor))
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        return self.element_types.get(producer.input[0], 0)


def _channel_axis(layer: NodeProto, side: int, rank: int) -> int:
    """Return the axis of a weight's per-channel scales: that of the output channels, except for ConvTranspose."""
    if layer.op_type in ("Conv", "ConvTranspose"):
        return 0
    if layer.op_type == "Gemm" and attribute(layer, "transB" if side == 1 else "transA", 0):
        return 1 - side
    return rank - 1 if side == 1 else rank - 2


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(weights_as_inputs(model)).graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    return {i.name: i.type.tensor_type.elem_type for i in infos if i.type.tensor_type.elem_type}


def _array(tensor: TensorProto) -> np.ndarray:
    return external.values(tensor)


def _name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind))


def _line(node: NodeProto, problem: str, fix: str) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r} {problem}; {fix}"
