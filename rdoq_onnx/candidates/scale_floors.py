"""Lower bounds on channel scales, so that biases fit INT32."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model import external
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.layers import Layer

Float = NDArray[np.float64]

# ONNX Runtime stores a bias as INT32 in units of (activation scale x weight scale).
_BIAS_LIMIT = 2.0**29


def scale_floors(network: Network, ranges: Mapping[str, tuple[float, float]]) -> list[Float | None]:
    """Return the least scale of each channel whose bias then fits INT32 in integer kernels; None without a bias."""
    sources = {feed: a.tensor for a in network.activations for feed in a.feeds}
    graph = Graph(network.model)
    nodes = {n.name: n for n in graph.nodes}
    floors: list[Float | None] = []
    for layer in network.layers:
        candidates = [
            _scale_floor(layer, _bias(nodes[use.node], graph), ranges[sources[use.data]])
            for use in layer.uses
            if use.data in sources and layer.linear.op_type != "ConvTranspose"
        ]
        bounds = [floor for floor in candidates if floor is not None]
        floors.append(np.maximum.reduce(bounds) if bounds else None)
    return floors


def _scale_floor(layer: Layer, bias: TensorProto | None, data: tuple[float, float]) -> Float | None:
    """Return the floor for one use of `layer`, whose data input has the range `data`."""
    step = max(data[1], 0.0) - min(data[0], 0.0)
    if bias is None or step <= 0:
        return None
    values = np.abs(external.values(bias).astype(np.float64))
    aligned = values.ndim and values.shape[-1] == layer.linear.channels
    spread = values.reshape(-1, layer.linear.channels).max(axis=0) if aligned else values.max(initial=0.0)
    # The narrowest activation quantizer has the finest scale: a tenth of the range over 255 steps.
    floor = spread / (_BIAS_LIMIT * max(step / 2550, 1e-30))
    return np.broadcast_to(floor, (layer.linear.channels,))


def _bias(node: NodeProto, graph: Graph) -> TensorProto | None:
    """Return a layer's bias, or None. ONNX Runtime fuses a MatMul and the Add behind it into one Gemm."""
    if len(node.input) > 2:
        return graph.initializers.get(node.input[2])
    consumer = graph.sole_consumer(node.output[0])
    if node.op_type != "MatMul" or consumer is None or consumer.op_type != "Add":
        return None
    return next((graph.initializers[i] for i in consumer.input if i in graph.initializers), None)
