"""HardSwish as a product of integers, which ONNX Runtime runs as one kernel.

With x = s (q - z) and s = 3 / z, where q is UINT8 and saturates at 0, thus x at -3:

    HardSwish(x) = x · min(x + 3, 6) / 6 = s (q - z) · s/6 min(q, 2z)

Both factors are q and its clip under other scales and zero points: nothing is rounded that was not before. In float,
HardSwish between integers takes five passes over memory: two DequantizeLinears, HardSigmoid, Mul, QuantizeLinear.
"""

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Node, Variable
from rdoq_onnx.passes import Pass

_REACH = 3  # HardSwish is 0 below its negative


@dataclass(frozen=True)
class IntegerHardSwish(Pass):
    """Replace each HardSwish between quantizers, of which the one before begins at -3 in whole parts of 3.

        q ─ DequantizeLinear(s, z) ─ HardSwish ─ QuantizeLinear
        q ─┬─ DequantizeLinear(s, z) ────────────┬─ Mul ─ QuantizeLinear
           └─ Clip ─ DequantizeLinear(s / 6, 0) ─┘

    Leaves any other as it is.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        def replace(graph: Graph) -> None:
            for node in [n for n in graph.nodes if n.op == "HardSwish" and surgeon.standard(n)]:
                decoder = _decoder(node)
                if decoder is not None and any(n.op == "QuantizeLinear" for n in node.outputs[0].outputs):
                    _multiply(graph, node, decoder)

        return surgeon.edit(model, replace)


def _decoder(node: Node) -> Node | None:
    """The DequantizeLinear in front of `node`, if its integers are read as the module says."""
    decoder = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if decoder is None or decoder.op != "DequantizeLinear" or len(decoder.inputs) < 3:
        return None
    scale, zero_point = (surgeon.values(t) for t in decoder.inputs[1:3])
    if scale is None or zero_point is None or zero_point.ndim or zero_point.dtype != np.uint8 or not zero_point:
        return None
    return decoder if scale == np.float32(_REACH / zero_point.item()) else None


def _multiply(graph: Graph, node: Node, decoder: Node) -> None:
    integers, scale, zero_point = decoder.inputs
    step, origin = np.float32(surgeon.values(scale)), int(surgeon.values(zero_point))
    stem = node.name
    gate = integers
    if 2 * origin < 255:
        top = _constant(graph, f"{stem}_highest", np.array(2 * origin, np.uint8))
        gate = surgeon.append(graph, "Clip", [integers, Variable(""), top], f"{stem}_Clip")
    codes = (
        _constant(graph, f"{stem}_scale", np.array(step / (2 * _REACH), np.float32)),
        _constant(graph, f"{stem}_zero_point", np.array(0, np.uint8)),
    )
    decoded = surgeon.append(graph, "DequantizeLinear", [gate, *codes], f"{stem}_DequantizeLinear", like=node.inputs[0])
    node.op, node.inputs = "Mul", [node.inputs[0], decoded]


def _constant(graph: Graph, stem: str, value: np.ndarray) -> Constant:
    return surgeon.constant(surgeon.fresh(graph, stem), value)
