"""How operators without weights propagate channels: `propagate` dispatches to one function per rule."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.passes.pruning.stored_layers import initializer

UNARY = frozenset({"Abs", "Cast", "Ceil", "Celu", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"})
UNARY |= {"Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt"}
UNARY |= {"Tanh", "ThresholdedRelu"}
BROADCASTING = frozenset({"Add", "Clip", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub"})
CODING = frozenset({"QuantizeLinear", "DequantizeLinear"})
POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "MaxPool"})

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor, whose axis has `trailing` axes after it. All arrays are [C].

    slots: int64 ids; entries with the same id are one channel. constant: whether a channel has the same value at all
    positions and for all inputs. values: that value, in the tensor's dtype; arbitrary where not `constant`.
    """

    slots: NDArray[np.int64]
    values: NDArray[Any]
    constant: NDArray[np.bool_]
    trailing: int


def propagate(node: onnx.NodeProto, inputs: Mapping[str, Channels], graph: Graph, shapes: Shapes) -> Channels | None:
    """The channels of the only output of `node`; None if they are unknown.

    inputs: the known channels of its inputs, at least one. The result has the slots of the first; except for a Concat,
    the caller must couple the slots of the others to them. shapes: 0 for unknown sizes.
    """
    op = node.op_type
    if op in UNARY | BROADCASTING | CODING:
        return _elementwise(node, inputs, graph)
    if op == "Concat":
        return _joined(node, inputs, shapes)
    data = inputs.get(node.input[0])
    if data is None or not data.trailing:
        return None
    if op in POOLS:
        return data
    if op == "AveragePool":
        return _averaged(node, data)
    if op in ("Flatten", "Reshape"):
        return _flat(node, data, graph, shapes)
    if op in ("ReduceMean", "Squeeze"):
        return _reduced(node, data, graph)
    if op == "Resize":
        return _resized(node, data, graph)
    return _padded(node, data, graph) if op == "Pad" else None


def _elementwise(node: onnx.NodeProto, inputs: Mapping[str, Channels], graph: Graph) -> Channels | None:
    first = next(iter(inputs.values()))
    count, trailing = first.slots.size, first.trailing
    if node.op_type in CODING and len(node.input) < 3:
        return None
    if any(x.slots.size != count or x.trailing != trailing for x in inputs.values()):
        return None
    shape = (count, *[1] * trailing)
    feeds = {n: np.where(x.constant, x.values, np.ones_like(x.values)).reshape(shape) for n, x in inputs.items()}
    for name in node.input:
        if not name or name in inputs:
            continue
        value = initializer(name, graph)
        wide = value is not None and value.ndim > trailing and value.shape[-trailing - 1] not in (1, count)
        if value is None or wide or (node.op_type in CODING and value.size > 1):
            return None
        feeds[name] = value
    constant = np.logical_and.reduce([x.constant for x in inputs.values()])
    if node.op_type == "Mul":  # zero times anything is zero
        constant |= np.logical_or.reduce([x.constant & (x.values == 0) for x in inputs.values()])
    result = _evaluate(node, feeds, graph)
    if result.size != count:  # some input constant varies over positions
        return Channels(first.slots, np.zeros(count, result.dtype), np.zeros(count, bool), trailing)
    return Channels(first.slots, result.reshape(-1), constant, trailing)


def _evaluate(node: onnx.NodeProto, feeds: dict[str, NDArray[Any]], graph: Graph) -> NDArray[Any]:
    if node.op_type in CODING:
        return _coded(node.op_type, *(feeds[name] for name in node.input))
    inputs = [onnx.ValueInfoProto(name=name) for name in feeds]
    body = helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=node.output[0])])
    model = helper.make_model(body, opset_imports=graph.opsets)
    with np.errstate(all="ignore"):
        (value,) = ReferenceEvaluator(model).run(None, feeds)
    return np.asarray(value)


def _coded(op: str, x: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any]) -> NDArray[Any]:
    """QuantizeLinear or DequantizeLinear; onnx's QuantizeLinear overflows on large quotients and requires opset 19."""
    if op == "DequantizeLinear":
        return np.asarray((x.astype(np.float32) - zero_point.astype(np.float32)) * scale)
    bounds = np.iinfo(zero_point.dtype)
    with np.errstate(over="ignore"):
        levels = np.rint(x / scale) + zero_point.astype(np.float32)
    return np.asarray(np.clip(levels, bounds.min, bounds.max).astype(zero_point.dtype))


def _joined(node: onnx.NodeProto, inputs: Mapping[str, Channels], shapes: Shapes) -> Channels | None:
    """Concat along the channel axis."""
    parts = [inputs[name] for name in node.input if name in inputs]
    trailing = parts[0].trailing
    rank = trailing + 2 if trailing else len(shapes.get(node.input[0], ()))
    axis = attribute(node, "axis", 1)
    axis = axis if axis < 0 else axis - rank
    if len(parts) < len(node.input) or any(x.trailing != trailing for x in parts) or axis != -trailing - 1:
        return None
    return Channels(
        np.concatenate([x.slots for x in parts]),
        np.concatenate([x.values for x in parts]),
        np.concatenate([x.constant for x in parts]),
        trailing,
    )


def _averaged(node: onnx.NodeProto, data: Channels) -> Channels:
    """An average of equal values is that value, unless padded zeros count."""
    bordered = attribute(node, "auto_pad", b"NOTSET") != b"NOTSET" or any(attribute(node, "pads", ()))
    if not attribute(node, "ceil_mode", 0) and not (attribute(node, "count_include_pad", 0) and bordered):
        return data
    return replace(data, constant=data.constant & (data.values == 0))


def _flat(node: onnx.NodeProto, data: Channels, graph: Graph, shapes: Shapes) -> Channels | None:
    """[N, C, *spatial] -> [N, C x spatial]."""
    size = int(np.prod(shapes.get(node.input[0], (0, 0, 0))[2:]))
    if node.op_type == "Flatten":
        fits = attribute(node, "axis", 1) == 1
    else:
        shape = initializer(node.input[1], graph)
        sizes = [] if shape is None or attribute(node, "allowzero", 0) else shape.tolist()
        fits = len(sizes) == 2 and (sizes[1] == data.slots.size * size or sizes == [0, -1])
    if not fits or size < 1:
        return None
    slots, values, constant = (np.repeat(x, size) for x in (data.slots, data.values, data.constant))
    return Channels(slots, values, constant, 0)


def _reduced(node: onnx.NodeProto, data: Channels, graph: Graph) -> Channels | None:
    """ReduceMean over all trailing axes, or Squeeze of them."""
    rank = data.trailing + 2
    axes = initializer(node.input[1], graph) if len(node.input) > 1 else attribute(node, "axes", ())
    if axes is None or sorted(int(a) % rank for a in axes) != list(range(2, rank)):
        return None
    keeps = node.op_type == "ReduceMean" and attribute(node, "keepdims", 1)
    return data if keeps else replace(data, trailing=0)


def _resized(node: onnx.NodeProto, data: Channels, graph: Graph) -> Channels | None:
    scales = initializer(node.input[2], graph) if len(node.input) == 3 else None
    plain = attribute(node, "mode", b"nearest") in (b"nearest", b"linear")
    crops = attribute(node, "coordinate_transformation_mode", b"half_pixel") == b"tf_crop_and_resize"
    whole = scales is not None and scales.size == data.trailing + 2 and bool((scales[:2] == 1).all())
    return data if plain and whole and not crops and not attribute(node, "axes", ()) else None


def _padded(node: onnx.NodeProto, data: Channels, graph: Graph) -> Channels | None:
    """Pad along trailing axes: a channel stays constant if its value is the padding value."""
    pads = initializer(node.input[1], graph)
    value = initializer(node.input[2], graph) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if len(node.input) > 3 or pads is None or value is None or pads.reshape(2, -1)[:, :2].any():
        return None
    if attribute(node, "mode", b"constant") != b"constant":
        return data
    return replace(data, constant=data.constant & (data.values == value.reshape(-1)[0]))
