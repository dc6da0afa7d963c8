"""Weights that no product unfolds: they join the search, but stay beside float data.

These are embedding tables, recurrent cells, stacks of matrices, and layers in the bodies of If, Loop and Scan:

    w ≈ s·q,  one s per row of a table, gate unit of a cell and direction, or output channel

The effect of a row that is looked up follows from its gradient (candidates/table_rows.py), that of all others from an
exact run of the weight as a whole (curves/missing_forms.py).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import NodeProto, TensorProto

from rdoq_onnx.analysis.skips import Excludes, Finiteness, Refusal, Skip, not_a_matrix
from rdoq_onnx.analysis.weight_origins import Origin, Scope, origins, walk
from rdoq_onnx.model.graph import SHAPE_OPS, Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES, Layer, Use
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.model.protos import all_nodes, all_outputs
from rdoq_onnx.targets import Target

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_TABLE = 1024  # elements: smallest embedding; smaller tables are shape arithmetic
_NODES = 256  # approximate bytes of the nodes and names that decode a tensor
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


@dataclass(frozen=True)
class Slot:
    """An initializer that a node takes weights from, or why these stay in float.

    scope: the scope of the node's graph. along: axes of the input along which rows, gate units or channels lie;
    negative ones count from the last.
    """

    node: NodeProto
    scope: Scope
    origin: Origin | Refusal
    along: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.node.name or str(self.node.output[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--exclude` accepts for it."""
        return (self.name,) if isinstance(self.origin, Refusal) else (self.name, self.origin.tensor.name)

    def skip(self, refusal: Refusal) -> Skip:
        return Skip(self.name, self.node.op_type, refusal.reason)


def is_stack(node: NodeProto, graph: Graph) -> bool:
    """Whether `node`, in the main graph, multiplies with a stored stack of matrices."""
    stored = [graph.initializers[i] for i in node.input if i in graph.initializers]
    constant = [i for i in node.input if i in graph.constants]
    return node.op_type == "MatMul" and len(stored) == len(constant) == 1 and len(stored[0].dims) > 2


def find_slots(graph: Graph) -> tuple[Slot, ...]:
    """Find the slots of weights that no product unfolds, in the main graph and in nested bodies."""
    return tuple(slot for node, scope in walk(graph.model.graph) for slot in _slots(node, scope, graph))


def stored_weights(
    graph: Graph,
    slots: Sequence[Slot],
    multiplied: Mapping[str, Sequence[str]],
    target: Target,
    excludes: Excludes,
    finiteness: Finiteness,
) -> tuple[tuple[Layer, ...], tuple[Skip, ...]]:
    """The weights in `slots` that are quantized, and the nodes whose weights stay in float.

    multiplied: for each weight of a layer its nodes, which have integers of their own.
    """
    skipped: dict[Skip, None] = {}
    by_tensor: dict[str, list[tuple[Slot, Origin]]] = {}
    for slot in slots:
        origin = _quantizable(slot, target, excludes, finiteness)
        if isinstance(origin, Refusal):
            skipped[slot.skip(origin)] = None
        else:
            by_tensor.setdefault(origin.tensor.name, []).append((slot, origin))
    consumers = _consumers(all_nodes(graph.model.graph), by_tensor)
    exposed = {o.name for o in all_outputs(graph.model.graph)}
    chosen = []
    for tensor, users in by_tensor.items():
        own = {id(origin.consumer) for _, origin in users}  # `users` keeps the nodes alive, and so the ids unique
        others = [n for n in consumers[tensor] if id(n) not in own and n.op_type not in SHAPE_OPS]
        other = next((n for n in others if n.name not in multiplied.get(tensor, ())), None)
        if other is not None or tensor in exposed:
            use = "is an output" if other is None else f"also feeds {other.op_type} {other.name or other.output[0]!r}"
            refusal = Refusal(f"its weight {tensor!r} {use}, which needs it in float")
            skipped.update(dict.fromkeys(slot.skip(refusal) for slot, _ in users))
        else:
            chosen.append(_chosen([slot for slot, _ in users], users[0][1]))
    shared = Counter(layer.name for layer in chosen)  # a recurrent cell has two weights
    named = (replace(x, name=x.weight) if shared[x.name] > 1 else x for x in chosen)
    return tuple(named), tuple(skipped)


def _quantizable(slot: Slot, target: Target, excludes: Excludes, finiteness: Finiteness) -> Origin | Refusal:
    """The slot's origin, unless it is excluded or unfit, or `target` cannot decode it."""
    origin = slot.origin
    if isinstance(origin, Refusal):
        return origin
    excluded = excludes.refusal(slot.node.op_type, slot.names)
    unfit = excluded or _unreadable(slot.scope, target) or _unfit(origin.tensor, _axes(slot, origin))
    return unfit or finiteness(origin.tensor) or origin


def _chosen(slots: Sequence[Slot], origin: Origin) -> Layer:
    """The weight that the slots share; `origin` is that of the first slot."""
    first, tensor = slots[0], origin.tensor
    linear = Linear(first.node.op_type, tuple(tensor.dims), axes=_axes(first, origin))
    uses = {s.name: _use(s, tensor, linear) for s in slots}
    return Layer(first.name, tensor.name, linear, tuple(uses.values()))


def _use(slot: Slot, tensor: TensorProto, linear: Linear) -> Use:
    """The use of a weight by the slot's node; with data and output only where rows of a table are looked up."""
    node = slot.node
    of_rows = node.op_type == "Gather" and node.input[0] == tensor.name and linear.axes == (0,)
    data, output = (node.input[1], node.output[0]) if of_rows and not slot.scope.owners else ("", "")
    return Use(slot.name, data, output, linear)


def _slots(node: NodeProto, scope: Scope, graph: Graph) -> Iterator[Slot]:
    if node.domain not in ("", "ai.onnx"):
        return
    if node.op_type in RECURRENT:
        for index in (1, 2):
            sources = origins(node.input[index], node, scope)
            yield from _each(node, scope, sources, (0, 1))
    elif node.op_type == "Gather":
        sources = origins(node.input[0], node, scope)
        if not isinstance(sources, Refusal) and all(_is_table(origin.tensor) for origin in sources):
            yield from _each(node, scope, sources, (attribute(node, "axis", 0),))
    elif is_stack(node, graph) or (scope.owners and node.op_type in LAYER_TYPES):
        side, sources = _constant_side(node, scope)
        yield from _each(node, scope, sources, (_channel_axis(node, side),))


def _each(
    node: NodeProto, scope: Scope, sources: tuple[Origin, ...] | Refusal, along: tuple[int, ...]
) -> Iterator[Slot]:
    for origin in (sources,) if isinstance(sources, Refusal) else sources:
        yield Slot(node, scope, origin, along)


def _axes(slot: Slot, origin: Origin) -> tuple[int, ...]:
    """The slot's axes `along` as axes of the initializer."""
    rank = len(origin.axes)
    stored = {origin.axes[a] for a in slot.along if -rank <= a < rank}
    return tuple(sorted(k for k in stored if k is not None))


def _constant_side(node: NodeProto, scope: Scope) -> tuple[int, tuple[Origin, ...] | Refusal]:
    """The index of the weight input, and its origins: 0 only for a MatMul whose input 1 is not constant."""
    right = origins(node.input[1], node, scope)
    if node.op_type == "MatMul" and isinstance(right, Refusal):
        left = origins(node.input[0], node, scope)
        if not isinstance(left, Refusal):
            return 0, left
    return 1, right


def _channel_axis(node: NodeProto, side: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return 1 if node.op_type in ("ConvTranspose", "Gemm") else side - 2


def _is_table(tensor: TensorProto) -> bool:
    return tensor.data_type in _FLOATS and len(tensor.dims) > 1 and math.prod(tensor.dims) >= _TABLE


def _unreadable(scope: Scope, target: Target) -> Refusal | None:
    """Why `target` cannot decode integer weights in that scope; None if it can."""
    if not target.weight_only:
        return Refusal(f"--target {target.name} takes integer weights only with quantized data")
    owner = next((n for n in scope.owners if n.op_type in target.closed), None)
    if owner is None:
        return None
    return Refusal(f"--target {target.name} does not decode weights in the body of a {owner.op_type}")


def _unfit(tensor: TensorProto, axes: Sequence[int]) -> Refusal | None:
    """Why an initializer stays in float; None if it can be quantized."""
    unfit = not_a_matrix(tensor)
    if unfit is not None:
        return unfit
    elements, scales = math.prod(tensor.dims), math.prod(tensor.dims[k] for k in axes)
    if elements + 4 * scales + _NODES >= 4 * elements:
        return Refusal(f"its weight is so small ({elements} elements) that integers and scales would take more bytes")
    return None


def _consumers(nodes: Iterable[NodeProto], tensors: Mapping[str, object]) -> dict[str, list[NodeProto]]:
    consumers: dict[str, list[NodeProto]] = {name: [] for name in tensors}
    for node in nodes:
        for name in dict.fromkeys(node.input):
            if name in consumers:
                consumers[name].append(node)
    return consumers
