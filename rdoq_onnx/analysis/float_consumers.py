"""Which readers of an activation want it quantized, and which lose by it.

An Add in front of a LayerNormalization, the product with a gate, the skip around a whole network: no integer kernel
takes them in. A quantizer in front of them costs accuracy and a DequantizeLinear, and saves nothing; they read the
float tensor. Where an integer kernel makes the activation there is none to read, so that all readers get what it makes.
"""

from collections.abc import Callable, Collection

from onnx import NodeProto

from rdoq_onnx.model.graph import CLAMPS, SIZES, Graph, behind_clamp, moves


def quantized_readers(
    graph: Graph, activations: Collection[str], quantized: Collection[str], integer: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """For each of `activations` that some nodes shall read in float: the nodes that read it quantized.

    quantized: the tensors that quantizers follow. integer: nodes that are known to compute on integers.
    """

    def held(tensor: str) -> bool:
        return graph.root(tensor) in quantized

    def fuses(node: NodeProto) -> bool:
        ends = (behind_clamp(o, graph) for o in node.output if o)
        return not moves(node, graph) and all(held(i) for i in node.input if i) and all(e in quantized for e in ends)

    wanting = {n.name for n in graph.nodes if n.name in integer or fuses(n)}
    wanted = {i for n in graph.nodes if n.name in wanting for i in n.input}
    for node in reversed(graph.nodes):
        if moves(node, graph) and not wanted.isdisjoint(node.output):
            wanting.add(node.name)
            wanted.add(node.input[0])
    made = _made(graph, held)
    found = {}
    for tensor in activations:
        readers = [n for n in graph.consumers.get(tensor, []) if n.op_type not in SIZES]
        names = tuple(n.name for n in readers if n.name in wanting)
        if tensor not in made and len(names) < len(readers):
            found[tensor] = names
    return found


def _made(graph: Graph, held: Callable[[str], bool]) -> set[str]:
    """What integer kernels make, of quantized data alone, or a Concat joins of it and others."""
    made: set[str] = set()
    for node in graph.nodes:
        data = [i for i in node.input if i and i not in graph.constants]
        if node.op_type in CLAMPS or moves(node, graph):
            integer = node.input[0] in made
        elif node.op_type == "Concat":
            integer = not made.isdisjoint(data)
        else:
            integer = bool(data) and all(map(held, data))
        made.update(node.output if integer else ())
    return made
