"""Fold a factor and an offset for all channels behind a HardSwish into the layer that reads the result.

PP-LCNetV3 learns y = a z + b with two numbers behind each activation function. They fold as a BatchNormalization in
front of a layer does (fold_batchnorm.py). In front of padding, which comes after the offset, y = a (z + b / a), and
only a folds.
"""

from dataclasses import dataclass

from onnx import ModelProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Graph, Node, Tensor
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.fold_batchnorm import fold_before
from rdoq_onnx.passes.normalization.linear_layer import (
    bias_of,
    float64,
    ranks_of,
    rewrite,
    set_input,
    sole_consumer,
    unfold,
    weight_of,
)


@dataclass(frozen=True)
class FoldScalars(Pass):
    """Fold Mul and Add by numbers behind a HardSwish where a layer is all that reads them.

    Assumes a normalized model. Leaves an offset in front of padding, and other operators than HardSwish: ONNX Runtime
    recognizes some by the numbers behind them, such as Gelu.
    """

    def __call__(self, model: ModelProto) -> ModelProto:
        if all(node.op_type != "HardSwish" for node in model.graph.node):
            return model
        ranks = ranks_of(model)

        def fold(graph: Graph) -> None:
            for node in [n for n in reversed(graph.nodes) if _follows_hard_swish(n)]:
                source = _data(node) if node.outputs else None
                if source is not None and not fold_before(graph, node, source, ranks):
                    _fold_factor(graph, node, ranks)

        return surgeon.edit(model, fold)


def _follows_hard_swish(node: Node) -> bool:
    """Whether `node` multiplies a HardSwish by a number, or adds one to it or to such a product."""
    if node.op not in ("Mul", "Add") or not surgeon.standard(node) or not node.outputs:
        return False
    data = _data(node)
    producer = data.inputs[0] if data is not None and data.inputs else None
    if producer is None:
        return False
    return producer.op == "HardSwish" or (node.op == "Add" and producer.op == "Mul" and _follows_hard_swish(producer))


def _data(node: Node) -> Tensor | None:
    """What `node` combines with a constant of one element; None if it does anything else."""
    for tensor, other in (node.inputs, reversed(node.inputs)):
        value = float64(other)
        if value is not None and value.size == 1 and value.ndim <= 1:
            return tensor
    return None


def _fold_factor(graph: Graph, add: Node, ranks: dict[str, int]) -> bool:
    """Fold a factor in front of `add` into the layer behind it: a z + b = a (z + b / a)."""
    source = _data(add) if add.op == "Add" and add.inputs else None
    mul = source.inputs[0] if source is not None and source.inputs else None
    layer = sole_consumer(graph, add.outputs[0]) if source is not None else None
    weight = weight_of(layer, ranks) if layer is not None and layer.inputs[0] is add.outputs[0] else None
    if source is None or mul is None or layer is None or weight is None:
        return False
    if mul.op != "Mul" or sole_consumer(graph, source) is not add:
        return False
    inner, side = _data(mul), 1 if add.inputs[0] is source else 0
    rows = unfold(layer, weight)
    bias, offset = bias_of(layer, rows.shape[0] * rows.shape[1]), float64(add.inputs[side])
    factor = None if inner is None else float64(mul.inputs[1 if mul.inputs[0] is inner else 0])
    if inner is None or bias is None or offset is None or factor is None or not factor.all():
        return False
    kind = add.inputs[side].values.dtype
    if not rewrite(graph, layer, mul, inner, rows * factor.item(), bias):
        return False
    set_input(graph, add, side, (offset / factor.item()).astype(kind), "offset")
    return True
