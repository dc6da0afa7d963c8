"""Weighted layers as an emitted file stores them: weights as integers and scales or floats, and biases.

weight   INT8 ─ DequantizeLinear    or    INT8 ─ Cast ─ Mul    or    FLOAT    (scales of blocks: read as FLOAT)
bias     INT32 ─ DequantizeLinear (weight scale x activation scale)    or    FLOAT    or    none
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.model import external
from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES


@dataclass(frozen=True)
class Codes:
    """The quantized data of a layer: the tensor of integers, its zero point and scale."""

    tensor: str
    zero_point: int
    scale: np.float32


@dataclass(frozen=True)
class StoredLayer:
    """A layer whose weights and bias are initializers.

    blocks: weights as stored, int8 or float, [groups, outputs per group, inputs per group, kernel positions].
    scales: float32 [outputs of all groups], None for float weights. bias: [outputs of all groups], or None.
    codes: set if the layer accumulates integers; `bias` is then int32 in steps of weight scale x activation scale,
    else float. adder: the Add of a constant that is the only consumer of a MatMul. padded: whether outputs at the
    border read padded zeros. spatial: number of axes after the channel axis of data and outputs.
    """

    node: onnx.NodeProto
    blocks: NDArray[Any]
    scales: NDArray[np.float32] | None
    bias: NDArray[Any] | None
    codes: Codes | None
    adder: onnx.NodeProto | None
    padded: bool
    spatial: int

    @property
    def label(self) -> str:
        return f"{self.node.op_type} {self.node.name}"

    @property
    def inputs(self) -> int:
        return int(self.blocks.shape[0] * self.blocks.shape[2])

    @property
    def outputs(self) -> int:
        return int(self.blocks.shape[0] * self.blocks.shape[1])

    @property
    def depthwise(self) -> bool:
        return self.blocks.shape[0] > 1 and self.blocks.shape[1:3] == (1, 1) and self.node.op_type == "Conv"

    @cached_property
    def used(self) -> NDArray[np.bool_]:
        """Which inputs of its group each output depends on, [groups, outputs, inputs]."""
        return np.asarray(self.blocks.any(axis=-1))

    def summed(self, data: NDArray[Any]) -> NDArray[Any]:
        """The contribution of position-independent data, [inputs], to the outputs, [outputs].

        int64 in steps of weight scale x activation scale if `codes` is set and `data` is int64, else float64.
        """
        sums, parts = self._kernel_sums(data)
        total: NDArray[Any] = (sums @ parts).reshape(-1)
        return total if self.scales is None or self.codes else total * self.scales

    def reach(self, data: NDArray[np.int64]) -> int:
        """An upper bound of the bias's magnitude after it absorbs any part of `data`."""
        sums, parts = self._kernel_sums(data)
        bias = np.zeros(1, np.int64) if self.bias is None else np.abs(self.bias.astype(np.int64))
        return int((bias + (np.abs(sums) @ np.abs(parts)).reshape(-1)).max())

    def _kernel_sums(self, data: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Σ_k w, [groups, outputs, inputs], and data, [groups, inputs, 1], for inputs nonzero in some group."""
        parts = data.reshape(self.blocks.shape[0], -1)
        nonzero = parts.any(axis=0)
        return self.blocks[:, :, nonzero].sum(axis=-1, dtype=data.dtype), parts[:, nonzero, None]

    def values(self, added: NDArray[Any]) -> NDArray[np.float32]:
        """The outputs, [outputs], that result from only the bias and `added`, as returned by `summed`."""
        total = added if self.bias is None else self.bias + added
        if self.codes and self.scales is not None:
            return total.astype(np.float32) * (self.scales * self.codes.scale)
        return total.astype(np.float32)


def read_layer(node: onnx.NodeProto, graph: Graph) -> StoredLayer | None:
    """Read `node` as stored; None if weight or bias has none of the forms above, or it transposes or scales data."""
    scaled = attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0
    weight = _weight(node.input[1], graph)
    if scaled or attribute(node, "transA", 0) or weight is None:
        return None
    stored, scales = weight
    if stored.ndim < 2 or (stored.ndim > 2) != node.op_type.startswith("Conv"):
        return None
    blocks = _blocks(node, stored)
    outputs = blocks.shape[0] * blocks.shape[1]
    if scales is not None and scales.size != outputs:  # a grouped ConvTranspose shares scales between groups
        return None
    codes = _codes(node, graph) if node.op_type in ("Conv", "Gemm") else None
    bias = None
    if len(node.input) > 2 and node.input[2]:
        decoder = graph.producer.get(node.input[2])
        bias = initializer(node.input[2] if decoder is None else decoder.input[0], graph)
        if bias is None or bias.size != outputs or (decoder is not None and not _integer_bias(node, decoder, graph)):
            return None
        bias, codes = bias.reshape(-1), codes if decoder is not None else None
    return StoredLayer(
        node, blocks, scales, bias, codes, _adder(node, graph), _pads(node, stored.shape[2:]), stored.ndim - 2
    )


def initializer(name: str, graph: Graph) -> NDArray[Any] | None:
    tensor = graph.initializers.get(name)
    return None if tensor is None else external.values(tensor)


def _weight(name: str, graph: Graph) -> tuple[NDArray[Any], NDArray[np.float32] | None] | None:
    """The stored weight and its flat scales; None if the decoded tensor is used for anything but weights of layers."""
    node = graph.producer.get(name)
    others = [n for n in graph.consumers.get(name, []) if n.op_type not in LAYER_TYPES or n.input[1] != name]
    if node is not None and (others or name in graph.outputs):
        return None
    if node is None:
        stored = initializer(name, graph)
        return None if stored is None or stored.dtype != np.float32 else (stored, None)
    source = node.input[0]
    if node.op_type == "Mul":
        cast = graph.producer.get(source)
        alone = cast is not None and cast.op_type == "Cast" and graph.sole_consumer(source) is not None
        source = cast.input[0] if cast is not None and alone else ""
    elif node.op_type != "DequantizeLinear":
        return None
    stored, spread = initializer(source, graph), graph.producer.get(node.input[1])
    if spread is not None and spread.op_type == "Gather":
        factors = _of_blocks(spread, graph)
        fits = stored is not None and stored.dtype == np.int8 and factors is not None
        return (stored * factors, None) if fits else None
    zero_point = initializer(node.input[2], graph) if len(node.input) > 2 else np.zeros(1)
    scales = initializer(node.input[1], graph)
    if stored is None or stored.dtype != np.int8 or scales is None or zero_point is None or zero_point.any():
        return None
    return stored, scales.reshape(-1)


def _of_blocks(gather: onnx.NodeProto, graph: Graph) -> NDArray[np.float32] | None:
    """Return what `gather` spreads over a weight; see passes/block_numbers.py."""
    cast = graph.producer.get(gather.input[1])
    numbers = None if cast is None or cast.op_type != "Cast" else initializer(cast.input[0], graph)
    scales = initializer(gather.input[0], graph)
    if numbers is None or scales is None or scales.ndim != 2:
        return None
    return np.take(scales, numbers, attribute(gather, "axis", 0))


def _blocks(node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    group = attribute(node, "group", 1)
    if node.op_type == "Conv":
        return weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    if node.op_type == "ConvTranspose":
        return weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1).swapaxes(1, 2)
    return (weight if attribute(node, "transB", 0) else weight.T)[None, :, :, None]


def _codes(node: onnx.NodeProto, graph: Graph) -> Codes | None:
    data, weight = graph.producer.get(node.input[0]), graph.producer.get(node.input[1])
    if data is None or weight is None or data.op_type != "DequantizeLinear" or weight.op_type != "DequantizeLinear":
        return None
    scale, zero_point = (initializer(i, graph) for i in (*data.input, "")[1:3])
    if scale is None or scale.size != 1 or zero_point is None:
        return None
    return Codes(data.input[0], int(zero_point), np.float32(scale))


def _integer_bias(node: onnx.NodeProto, decoder: onnx.NodeProto, graph: Graph) -> bool:
    """Whether `decoder` scales the bias by the product of the scales of weight and data."""
    product = graph.producer.get(decoder.input[1])
    alone = all(graph.sole_consumer(i) is not None for i in (decoder.input[1], decoder.output[0]))
    if decoder.op_type != "DequantizeLinear" or product is None or product.op_type != "Mul" or not alone:
        return False
    factors = [graph.producer[i].input[1] for i in node.input[:2] if i in graph.producer]
    return _codes(node, graph) is not None and sorted(product.input) == sorted(factors)


def _adder(node: onnx.NodeProto, graph: Graph) -> onnx.NodeProto | None:
    consumer = graph.sole_consumer(node.output[0]) if node.op_type == "MatMul" else None
    constants = [i for i in consumer.input if i in graph.initializers] if consumer is not None else []
    return consumer if consumer is not None and consumer.op_type == "Add" and constants else None


def _pads(node: onnx.NodeProto, kernel: tuple[int, ...]) -> bool:
    if node.op_type == "ConvTranspose":  # strides insert zeros, and outputs at the border sum fewer products
        return True
    same = attribute(node, "auto_pad", b"NOTSET").startswith(b"SAME") and any(k > 1 for k in kernel)
    return same or any(attribute(node, "pads", ()))
