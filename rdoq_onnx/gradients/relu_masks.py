"""The slope of Relu, applied where it costs least.

MaxPool and Concat commute with Relu: a window whose largest element a Relu made has no slope just where the pooled
value is 0. So the adjoint is masked once, behind them, and the Relus in front pass on what reaches them: behind a
MaxPool there are fewer elements, behind a Concat there is one tensor in place of several.
"""

from onnx import NodeProto

from rdoq_onnx.gradients.elementwise import positive
from rdoq_onnx.gradients.tape import Grads, Tape
from rdoq_onnx.model.graph import Graph

_COMMUTES = frozenset({"Concat", "MaxPool"})


def masked_tensors(graph: Graph) -> frozenset[str]:
    """Tensors that Relus make and a MaxPool or Concat alone reads, all of whose inputs are such tensors."""
    alone: set[str] = set()  # made by Relus, read by one node
    found: set[str] = set()
    for node in graph.nodes:
        commutes = node.op_type in _COMMUTES and alone.issuperset(node.input)
        if commutes:
            found.update(node.input)
        if (commutes or node.op_type == "Relu") and graph.sole_consumer(node.output[0]) is not None:
            alone.add(node.output[0])
    return frozenset(found)


def masked(tape: Tape, node: NodeProto, grads: Grads) -> Grads:
    """The adjoints of a node's outputs, times the slope of the Relus in front of it where it is the last to commute."""
    y = node.output[0]
    if node.input[0] not in tape.masked or y in tape.masked or grads[0] is None:
        return grads
    return [tape.op("Mul", str(grads[0]), positive(tape, y)), *grads[1:]]
