"""How the time of a layer on integers follows the number of its channels, from models of the layer alone.

    t(k) / t(n) = 1 - m (1 - k / n)      k of n channels, m fitted to a quarter, half and three quarters of them

The numbers of channels are branches of one graph, whose runs take them in turns: other load slows all alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rdoq_onnx.emission.emit import DEPTHWISE, MULTIPLE
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.system.runtime import Runtime

_SHARES = (0.25, 0.5, 0.75)
_RUNS = 60
_QUARTILE = 0.25  # of the runs, as other load only adds
_OPSET = 17


@dataclass(frozen=True)
class Slopes:
    """m of a layer's output channels, and of its input channels; 0 where fewer of them save nothing."""

    outputs: float = 0.0
    inputs: float = 0.0


@dataclass(frozen=True)
class Alone:
    """A layer alone. data, weight: shapes; a matrix is [inputs, outputs]. conv: None for a matrix."""

    data: tuple[int, ...]
    weight: tuple[int, ...]
    conv: Linear | None = None

    @classmethod
    def of(cls, linear: Linear, data: tuple[int, ...]) -> "Alone | None":
        """Return the layer that reads a tensor of shape `data`; None if it has no integer kernel of its own."""
        if linear.op_type == "Conv":
            return cls(data, linear.shape, linear) if linear.group == 1 or linear.shape[1] == 1 else None
        if linear.op_type in ("Gemm", "MatMul") and linear.group == 1:
            rows = max(math.prod(data) // linear.inputs, 1)
            return cls((rows, linear.inputs), (linear.inputs, linear.channels))
        return None

    @property
    def depthwise(self) -> bool:
        return self.conv is not None and self.conv.group > 1

    @property
    def channels(self) -> tuple[int, int]:
        """The numbers of outputs and inputs."""
        outputs, inputs = self.weight[:2] if self.conv is not None else self.weight[::-1]
        return outputs, inputs

    def with_channels(self, outputs: int, inputs: int) -> "Alone":
        """Return the layer with fewer channels; a depthwise one has as many inputs as outputs."""
        if self.conv is None:
            return Alone((self.data[0], inputs), (inputs, outputs))
        read, group = (outputs, outputs) if self.depthwise else (inputs, 1)
        weight = (outputs, inputs, *self.weight[2:])
        return Alone((self.data[0], read, *self.data[2:]), weight, replace(self.conv, group=group))


def channel_slopes(linear: Linear, data: tuple[int, ...], runtime: Runtime) -> Slopes:
    """Time a layer that reads a tensor of shape `data` with fewer outputs, then with fewer inputs.

    A layer without an integer kernel of its own is taken to gain nothing.
    """
    layer = Alone.of(linear, data)
    if layer is None:
        return Slopes()
    outputs, inputs = layer.channels
    narrow = [(k, inputs) for k in _counts(outputs, DEPTHWISE if layer.depthwise else MULTIPLE)]
    shallow = [] if layer.depthwise else [(outputs, k) for k in _counts(inputs, MULTIPLE)]
    tried = [(outputs, inputs), *narrow, *shallow]
    whole, *taken = _seconds([layer.with_channels(*each) for each in tried], runtime)
    first, second = taken[: len(narrow)], taken[len(narrow) :]
    return Slopes(
        _slope([k / outputs for k, _ in narrow], [t / whole for t in first]),
        _slope([k / inputs for _, k in shallow], [t / whole for t in second]),
    )


def _counts(channels: int, multiple: int) -> list[int]:
    """Return about a quarter, half and three quarters of the channels, in numbers that removal leaves."""
    step = multiple if channels % multiple == 0 else 1
    counts = {max(round(share * channels / step) * step, step) for share in _SHARES}
    return sorted(counts - {channels})


def _slope(left: Sequence[float], taken: Sequence[float]) -> float:
    """Fit m by least squares. left, taken: shares of all channels, and of the time with them."""
    removed, saved = 1 - np.asarray(left), 1 - np.asarray(taken)
    return float(np.clip(removed @ saved / (removed @ removed), 0.0, 1.0)) if len(left) else 0.0


def _seconds(layers: Sequence[Alone], runtime: Runtime) -> list[float]:
    """Return the time of the kernel of each layer."""
    model = _side_by_side(layers)
    feeds = {i.name: np.zeros([d.dim_value for d in i.type.tensor_type.shape.dim], np.uint8) for i in model.graph.input}
    seconds, _ = runtime.profiled(model, feeds, _RUNS)
    # ONNX Runtime appends to the name of a node when it changes its layout.
    quartiles = {name.split("_")[0]: float(np.quantile(taken, _QUARTILE)) for name, taken in seconds.items()}
    return [quartiles[f"layer{k}"] for k in range(len(layers))]


def _side_by_side(layers: Sequence[Alone]) -> onnx.ModelProto:
    """Return a model with a branch for each layer, of bytes throughout."""
    scalars = {"scale": np.float32(0.02), "zero": np.uint8(128), "weight_zero": np.int8(0)}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in scalars.items()]
    nodes, inputs, outputs = [], [], []
    rng = np.random.default_rng(0)
    for k, layer in enumerate(layers):
        weight = rng.integers(-60, 60, layer.weight, dtype=np.int8)  # products of which no kernel saturates
        constants.append(numpy_helper.from_array(weight, f"w{k}"))
        read = [f"x{k}", "scale", "zero", f"w{k}", "scale", "weight_zero", "scale", "zero"]
        op = "QLinearMatMul" if layer.conv is None else "QLinearConv"
        nodes.append(helper.make_node(op, read, [f"y{k}"], f"layer{k}", **_attributes(layer.conv)))
        inputs.append(helper.make_tensor_value_info(f"x{k}", TensorProto.UINT8, layer.data))
        rank = [f"y{k}_{axis}" for axis in range(len(layer.data))]  # sizes are ONNX Runtime's to find
        outputs.append(helper.make_tensor_value_info(f"y{k}", TensorProto.UINT8, rank))
    graph = helper.make_graph(nodes, "side_by_side", inputs, outputs, constants)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", _OPSET)])


def _attributes(conv: Linear | None) -> dict[str, Any]:
    if conv is None:
        return {}
    found: dict[str, Any] = {"group": conv.group}
    found |= {name: list(value) for name in ("strides", "dilations") if (value := getattr(conv, name))}
    if conv.auto_pad != "NOTSET":
        return found | {"auto_pad": conv.auto_pad}
    return found | ({"pads": list(conv.pads)} if conv.pads else {})
