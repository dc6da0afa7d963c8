"""Write x · clip(x/6 + 1/2, 0, 1) as one operator.

    HardSwish(x) = x · HardSigmoid(x; α = 1/6, β = 1/2) = x · Clip(x + 3, 0, 6) / 6

(Howard et al., "Searching for MobileNetV3", 2019.) Exporters of opsets before 14 write it out. ONNX Runtime computes
the operator inside the convolution before it, but what is written out in passes of their own over memory.
"""

from dataclasses import dataclass

from onnx import ModelProto

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import surgeon
from rdoq_onnx.model.protos import default_opset
from rdoq_onnx.model.surgeon import Graph, Node, Tensor
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.normalize import raise_opset

_OPSET = 14  # of HardSwish
_CLOSE = 1e-5  # relative difference that a few roundings of float32 explain


@dataclass(frozen=True)
class FuseHardSwish(Pass):
    """Fuse the forms above, factors in any order, 1/6 before or after the product; raises the opset where it must.

    Assumes a normalized model: constants are initializers. Leaves what is in bodies, and all of a model that the
    version converter refuses.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        found: list[str] = []

        def fuse(graph: Graph) -> None:
            for node in reversed(graph.nodes):
                source = None if surgeon.in_body(graph, node) else _hard_swish(node)
                if source is not None:
                    node.op, node.inputs = "HardSwish", [source]
                    node.attrs.clear()
                    found.append(node.name)

        fused = surgeon.edit(model, fuse)
        if not found or default_opset(model) >= _OPSET:
            return fused if found else model
        try:
            raised = raise_opset(model, _OPSET)
        except ModelError:
            return model
        return surgeon.edit(raised, fuse)


def _hard_swish(node: Node) -> Tensor | None:
    """The x of which `node` computes the HardSwish."""
    source, factor = _product(node)
    return source if source is not None and abs(factor - 1) < _CLOSE else None


def _product(node: Node) -> tuple[Tensor | None, float]:
    """x and k where `node` computes k · HardSwish(x)."""
    scaled, factor = _scaled(node)
    if scaled is not None:
        source, inner = _product(scaled)
        return source, factor * inner
    if node.op == "Mul" and surgeon.standard(node):
        for gate, other in (node.inputs, reversed(node.inputs)):
            source, factor = _gate(gate)
            if source is other:
                return source, factor
    return None, 0.0


def _gate(tensor: Tensor) -> tuple[Tensor | None, float]:
    """x and k where `tensor` is k · clip(x/6 + 1/2, 0, 1)."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or not surgeon.standard(node):
        return None, 0.0
    if node.op == "HardSigmoid":
        alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
        return (node.inputs[0], 1.0) if _same(alpha, 1 / 6) and _same(beta, 0.5) else (None, 0.0)
    if node.op == "Clip":
        bounds = [_number(t) for t in node.inputs[1:]]
        shifted = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        if bounds == [0.0, 6.0] and shifted is not None and shifted.op == "Add" and surgeon.standard(shifted):
            for constant, source in (shifted.inputs, reversed(shifted.inputs)):
                if _number(constant) == 3:
                    return source, 6.0
        return None, 0.0
    scaled, factor = _scaled(node)
    if scaled is None:
        return None, 0.0
    source, inner = _gate(scaled.outputs[0])
    return source, factor * inner


def _scaled(node: Node) -> tuple[Node | None, float]:
    """A node and the number that `node` multiplies its output by."""
    if node.op not in ("Mul", "Div") or not surgeon.standard(node):
        return None, 0.0
    for number, other in ((node.inputs[1], node.inputs[0]), (node.inputs[0], node.inputs[1])):
        factor = _number(number)
        if factor and other.inputs:
            return other.inputs[0], 1 / factor if node.op == "Div" else factor
        if node.op == "Div":
            break  # the constant is divided
    return None, 0.0


def _number(tensor: Tensor) -> float | None:
    """The value of a constant with one element that adds no dimension to what it is multiplied by."""
    value = surgeon.values(tensor)
    return value.item() if value is not None and value.size == 1 and value.ndim <= 1 else None


def _same(a: float, b: float) -> bool:
    return abs(a - b) < _CLOSE * abs(b)
