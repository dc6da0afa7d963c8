"""Where the quantizers of activations go."""

from collections.abc import Iterable, Mapping, Sequence

from rdoq_onnx.analysis.float_consumers import quantized_readers
from rdoq_onnx.model.graph import Graph, behind_clamp, moves
from rdoq_onnx.model.layers import Activation, Layer

# Operators that ONNX Runtime runs on integers when all their inputs are quantized.
FUSES = frozenset({"Add", "Concat"})


def find_activations(graph: Graph, layers: Sequence[Layer], sums: Mapping[str, str]) -> tuple[Activation, ...]:
    """sums: outputs of convolutions that take in the Add behind them, which get no quantizer."""
    feeds: dict[str, dict[str, None]] = {}
    for layer in layers:
        for use in layer.uses:
            feeds.setdefault(graph.root(use.data), {})[use.data] = None
    parts = {root: _parts(root, graph, feeds) for root in feeds}
    joined = {p for several in parts.values() for p in several}
    found = [Activation(t, tuple(f), _moved(t, graph, f), parts[t]) for t, f in feeds.items()]
    settled = {*feeds, *joined, *graph.outputs, *sums}
    for tensor in dict.fromkeys(_convolution_outputs(graph, layers)):
        if tensor not in settled:
            found.append(Activation(tensor, moved=_moved(tensor, graph, ())))
    order = {name: k for k, name in enumerate([*graph.inputs, *graph.producer])}
    return tuple(sorted(found, key=lambda a: order[a.tensor]))


def find_branches(
    graph: Graph, layers: Sequence[Layer], activations: Sequence[Activation], sums: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """What BranchReaders takes: the activations that some nodes had better read in float."""
    quantized = {t for a in activations for t in (a.tensor, *a.parts)}
    feeding = [a.tensor for a in activations if not a.fusion]
    integer = {*sums.values(), *(u.node for x in layers for u in x.uses)}
    return quantized_readers(graph, feeding, quantized, integer)


def find_sums(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """For each output of a convolution that an Add alone reads, that Add's name."""
    readers = {t: graph.sole_consumer(t) for t in _convolution_outputs(graph, layers)}
    return {t: n.name for t, n in readers.items() if n is not None and n.op_type == "Add"}


def _convolution_outputs(graph: Graph, layers: Sequence[Layer]) -> list[str]:
    """What ONNX Runtime's integer convolution must see quantized to fuse."""
    return [behind_clamp(u.output, graph) for x in layers if x.linear.op_type == "Conv" for u in x.uses]


def _moved(root: str, graph: Graph, feeds: Iterable[str]) -> tuple[str, ...]:
    """Tensors downstream that hold moved values of `root` and feed a layer or an operator that fuses."""
    found: dict[str, None] = {}
    pending = [root]
    while pending:
        tensor = pending.pop()
        for node in graph.consumers.get(tensor, []):
            if moves(node, graph) and node.input[0] == tensor:
                fresh = [o for o in node.output if o and o not in found]
                found.update(dict.fromkeys(fresh))
                pending += fresh
    wanted = set(feeds)
    return tuple(
        t for t in found if t in wanted or any(n.op_type in FUSES for n in graph.consumers.get(t, []))
    )


def _parts(root: str, graph: Graph, feeds: Iterable[str]) -> tuple[str, ...]:
    """The inputs of the Concat that makes `root`, if it alone reads them and they are no moved activation."""
    joiner = graph.producer.get(root)
    if joiner is None or joiner.op_type != "Concat":
        return ()
    return tuple(
        p
        for p in dict.fromkeys(joiner.input)
        if p not in feeds and graph.sole_consumer(p) is joiner and graph.root(p) == p and p in graph.producer
    )
