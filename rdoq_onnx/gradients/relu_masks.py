"""Relu masks, applied where they cost least.

MaxPool and Concat commute with Relu: the gradient through a pooled Relu vanishes exactly where the pooled value is 0.
So the adjoint is masked once behind them, and the Relus in front pass it on: a MaxPool has fewer elements behind it, a
Concat has one tensor instead of several.
"""

from onnx import NodeProto

from rdoq_onnx.gradients.elementwise import positive
from rdoq_onnx.gradients.tape import Grads, Tape
from rdoq_onnx.model.graph import Graph

_COMMUTES = frozenset({"Concat", "MaxPool"})


def masked_tensors(graph: Graph) -> frozenset[str]:
    """Return Relu outputs whose only consumer is a MaxPool or Concat with nothing but such inputs."""
    rectified: set[str] = set()  # outputs of Relus, or of nodes that commute with them, with one consumer
    deferred: set[str] = set()
    for node in graph.nodes:
        commutes = node.op_type in _COMMUTES and rectified.issuperset(node.input)
        if commutes:
            deferred.update(node.input)
        if (commutes or node.op_type == "Relu") and graph.sole_consumer(node.output[0]) is not None:
            rectified.add(node.output[0])
    return frozenset(deferred)


def masked(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """Mask the adjoint of a node's first output by the Relus in front of it if it is the last node that commutes."""
    y = node.output[0]
    if node.input[0] not in tape.masked or y in tape.masked or grads[0] is None:
        return grads
    return [tape.op("Mul", str(grads[0]), positive(tape, y)), *grads[1:]]
