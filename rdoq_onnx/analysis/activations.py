"""Placement of activation quantizers."""

from collections.abc import Iterable, Mapping, Sequence

from rdoq_onnx.analysis.float_consumers import quantized_consumers
from rdoq_onnx.analysis.residual_streams import find_streams, stream_branches
from rdoq_onnx.model.graph import Graph, after_clamps, is_movement, operand_root
from rdoq_onnx.model.layers import Activation, Layer, Product

# Operators that ONNX Runtime runs on integers if all their inputs are quantized.
FUSES = frozenset({"Add", "Concat"})


def find_activations(
    graph: Graph, layers: Sequence[Layer], products: Sequence[Product], sums: Mapping[str, str]
) -> tuple[Activation, ...]:
    """Find the tensors to quantize, in graph order.

    sums: outputs of convolutions that absorb the Add after them, which therefore get no quantizer.
    """
    feeds: dict[str, dict[str, None]] = {}
    for layer in layers:
        for use in layer.uses:
            feeds.setdefault(graph.root(use.data), {})[use.data] = None
    for operand in (o for p in products for o in p.operands):
        root = graph.root(operand)
        feeds.setdefault(root if root in feeds else operand_root(operand, graph), {})[operand] = None
    parts = {root: _parts(root, graph, feeds) for root in feeds}
    joined = {p for inputs in parts.values() for p in inputs}
    activations = [Activation(t, tuple(f), _moved(t, graph, f), parts[t]) for t, f in feeds.items()]
    settled = {*feeds, *joined, *graph.outputs, *sums}
    convolved = [t for t in _convolution_outputs(graph, layers) if t not in settled]
    streams = [t for t in find_streams(graph, {*feeds, *joined, *convolved}, sums) if t not in settled]
    activations += [Activation(t, moved=_moved(t, graph, ())) for t in dict.fromkeys([*convolved, *streams])]
    order = {name: k for k, name in enumerate([*graph.inputs, *graph.producer])}
    return tuple(sorted(activations, key=lambda a: order[a.tensor]))


def find_branches(
    graph: Graph,
    layers: Sequence[Layer],
    products: Sequence[Product],
    activations: Sequence[Activation],
    sums: Mapping[str, str],
    narrow: bool,
) -> dict[str, tuple[str, ...]]:
    """The activations that some consumers should read in float, as BranchConsumers takes them.

    narrow: whether to add those that other nodes than layers should read in 8 bits (residual_streams.py).
    """
    quantized = {t for a in activations for t in (a.tensor, *a.parts)}
    feeding = [a.tensor for a in activations if not a.fusion]
    readers = {*(u.node for x in layers for u in x.uses), *(p.node for p in products)}
    branches = quantized_consumers(graph, feeding, quantized, {*sums.values(), *readers})
    if narrow:
        branches |= stream_branches(graph, feeding, quantized, readers, sums)
    return branches


def find_sums(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """For each convolution output whose only consumer is an Add, the name of that Add."""
    consumers = {t: graph.sole_consumer(t) for t in _convolution_outputs(graph, layers)}
    return {t: n.name for t, n in consumers.items() if n is not None and n.op_type == "Add"}


def _convolution_outputs(graph: Graph, layers: Sequence[Layer]) -> list[str]:
    """The tensors that must be quantized for ONNX Runtime's integer convolution to fuse."""
    return [after_clamps(u.output, graph) for x in layers if x.linear.op_type == "Conv" for u in x.uses]


def _moved(root: str, graph: Graph, feeds: Iterable[str]) -> tuple[str, ...]:
    """Tensors downstream of `root` that hold its moved values and feed a layer, a product or an operator that fuses."""
    moved: dict[str, None] = {}
    pending = [root]
    while pending:
        tensor = pending.pop()
        for node in graph.consumers.get(tensor, []):
            if is_movement(node, graph) and node.input[0] == tensor:
                new = [o for o in node.output if o and o not in moved]
                moved.update(dict.fromkeys(new))
                pending += new
    layer_inputs = set(feeds)
    return tuple(t for t in moved if t in layer_inputs or any(n.op_type in FUSES for n in graph.consumers.get(t, [])))


def _parts(root: str, graph: Graph, feeds: Iterable[str]) -> tuple[str, ...]:
    """The inputs of the Concat that produces `root` which have no other consumer and are not moved values."""
    concat = graph.producer.get(root)
    if concat is None or concat.op_type != "Concat":
        return ()
    return tuple(
        p
        for p in dict.fromkeys(concat.input)
        if p not in feeds and graph.sole_consumer(p) is concat and graph.root(p) == p and p in graph.producer
    )
