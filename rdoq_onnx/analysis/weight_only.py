"""Weights that are stored in integers though no curve tells what that does.

These are embedding tables, recurrent cells, stacks of matrices, and layers in the bodies of If, Loop and Scan:

    w ≈ s·q,  |q| ≤ 127, one s for each row of a table, gate unit of a cell and direction, or output channel

The search gives fewer bits to what it knows can spare them. These it does not measure, so they get 8, unless a pin says
otherwise.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from rdoq_onnx.analysis.patterns import channel_range, matches
from rdoq_onnx.analysis.skips import Excludes, Refusal, Skip, not_a_matrix, not_finite
from rdoq_onnx.analysis.weight_origins import Origin, Scope, origins, walk
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.graph import SIZES, Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.protos import all_nodes, all_outputs
from rdoq_onnx.targets import Target

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
BITS = 8
NARROWEST = 2  # bits that a pin may give
_TABLE = 1024  # elements of an embedding; smaller tables are shape arithmetic
_NODES = 256  # bytes of the nodes and names that decode a tensor, about
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


@dataclass(frozen=True)
class WeightOnly:
    """A float initializer, the nodes that apply it, and why the search does not reach it. Named after its first node.

    axes: those along which it has scales of its own.
    """

    name: str
    op_type: str
    tensor: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    reason: str
    nodes: tuple[str, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--pin` and `--exclude` know it by."""
        return (*self.nodes, self.tensor)


@dataclass(frozen=True)
class Slot:
    """A stored tensor that a node takes weights from, or why those stay in float.

    scope: of the graph that the node is in. along: the axes of the input along which rows, gate units or channels lie;
    from the last if negative. unsearched: why the search does not reach it.
    """

    node: NodeProto
    scope: Scope
    origin: Origin | Refusal
    along: tuple[int, ...]
    unsearched: str

    @property
    def name(self) -> str:
        return self.node.name or str(self.node.output[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--exclude` knows it by."""
        return (self.name,) if isinstance(self.origin, Refusal) else (self.name, self.origin.tensor.name)

    def skip(self, refusal: Refusal) -> Skip:
        return Skip(self.name, self.node.op_type, refusal.reason)


def is_stack(node: NodeProto, graph: Graph) -> bool:
    """Whether `node`, of the main graph, multiplies with stored matrices, more than one."""
    stored = [graph.initializers[i] for i in node.input if i in graph.initializers]
    constant = [i for i in node.input if i in graph.constants]
    return node.op_type == "MatMul" and len(stored) == len(constant) == 1 and len(stored[0].dims) > 2


def find_slots(graph: Graph) -> tuple[Slot, ...]:
    """What takes weights that the search does not reach, in the main graph and the bodies within it."""
    return tuple(slot for node, scope in walk(graph.model.graph) for slot in _slots(node, scope, graph))


def weight_only(
    graph: Graph,
    slots: Sequence[Slot],
    searched: Mapping[str, Sequence[str]],
    target: Target,
    excludes: Excludes,
) -> tuple[tuple[WeightOnly, ...], tuple[Skip, ...]]:
    """What of `slots` is quantized outside the search, and the nodes whose weights stay in float after all.

    searched: the nodes of each weight that the search quantizes, which have integers of their own.
    """
    skipped: dict[Skip, None] = {}
    found: dict[str, list[tuple[Slot, Origin]]] = {}
    for slot in slots:
        origin = _quantizable(slot, target, excludes)
        if isinstance(origin, Refusal):
            skipped[slot.skip(origin)] = None
        else:
            found.setdefault(origin.tensor.name, []).append((slot, origin))
    readers = _readers(all_nodes(graph.model.graph), found)
    exposed = {o.name for o in all_outputs(graph.model.graph)}
    chosen = []
    for tensor, several in found.items():
        own = {id(origin.reader) for _, origin in several}  # `several` holds them, so that ids stay their own
        others = [n for n in readers[tensor] if id(n) not in own and n.op_type not in SIZES]
        other = next((n for n in others if n.name not in searched.get(tensor, ())), None)
        if other is not None or tensor in exposed:
            use = "is an output" if other is None else f"also feeds {other.op_type} {other.name or other.output[0]!r}"
            refusal = Refusal(f"its weight {tensor!r} {use}, which takes it in float")
            skipped.update(dict.fromkeys(slot.skip(refusal) for slot, _ in several))
        else:
            chosen.append(_chosen([slot for slot, _ in several], several[0][1]))
    return tuple(chosen), tuple(skipped)


def _quantizable(slot: Slot, target: Target, excludes: Excludes) -> Origin | Refusal:
    """The slot's origin, unless it is excluded, unfit or not for `target` to decode."""
    origin = slot.origin
    if isinstance(origin, Refusal):
        return origin
    excluded = excludes.refusal(slot.node.op_type, slot.names)
    return excluded or _unreadable(slot.scope, target) or _unfit(origin.tensor, _axes(slot, origin)) or origin


def _chosen(slots: Sequence[Slot], origin: Origin) -> WeightOnly:
    """What the slots take, of which `origin` is the first's."""
    first, tensor = slots[0], origin.tensor
    names = tuple(dict.fromkeys(s.name for s in slots))
    return WeightOnly(
        first.name, first.node.op_type, tensor.name, tuple(tensor.dims), _axes(first, origin), first.unsearched, names
    )


def widths(unsearched: Sequence[WeightOnly], pins: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """The width of each: 8 bits, or what the last pin says. Raises ConfigError if a pin says less than 2."""
    result = []
    for weights in unsearched:
        bits = BITS
        for pattern, pinned in pins:
            if channel_range(pattern)[1] is None and matches(pattern, weights.names):
                if pinned < NARROWEST:
                    found = f"--pin {pattern}={pinned}: no curve tells what that does to {weights.name!r}"
                    raise ConfigError(f"{found}; give {NARROWEST} to {BITS} bits")
                bits = pinned
        result.append(bits)
    return tuple(result)


def _slots(node: NodeProto, scope: Scope, graph: Graph) -> Iterator[Slot]:
    if node.domain not in ("", "ai.onnx"):
        return
    owner = scope.owners[-1] if scope.owners else None
    inside = f"it is in the body of {owner.op_type} {owner.name or owner.output[0]!r}" if owner is not None else ""
    if node.op_type in RECURRENT:
        for index in (1, 2):
            given = origins(node.input[index], node, scope)
            yield from _each(node, scope, given, (0, 1), inside or "a recurrent cell feeds its errors back")
    elif node.op_type == "Gather":
        given = origins(node.input[0], node, scope)
        if not isinstance(given, Refusal) and all(_is_table(origin.tensor) for origin in given):
            yield from _each(node, scope, given, (attribute(node, "axis", 0),), inside or "its rows are looked up")
    elif is_stack(node, graph) or (inside and node.op_type in LAYER_TYPES):
        side, given = _constant_side(node, scope)
        yield from _each(node, scope, given, (_channel_axis(node, side),), inside or "it is a stack of matrices")


def _each(
    node: NodeProto, scope: Scope, given: tuple[Origin, ...] | Refusal, along: tuple[int, ...], unsearched: str
) -> Iterator[Slot]:
    for origin in (given,) if isinstance(given, Refusal) else given:
        yield Slot(node, scope, origin, along, unsearched)


def _axes(slot: Slot, origin: Origin) -> tuple[int, ...]:
    """The axes of the stored tensor along which the slot's lie."""
    rank = len(origin.axes)
    found = {origin.axes[a] for a in slot.along if -rank <= a < rank}
    return tuple(sorted(k for k in found if k is not None))


def _constant_side(node: NodeProto, scope: Scope) -> tuple[int, tuple[Origin, ...] | Refusal]:
    """Which input holds the weight, and where that comes from: the first only where a MatMul has no other."""
    given = origins(node.input[1], node, scope)
    if node.op_type == "MatMul" and isinstance(given, Refusal):
        left = origins(node.input[0], node, scope)
        if not isinstance(left, Refusal):
            return 0, left
    return 1, given


def _channel_axis(node: NodeProto, side: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return 1 if node.op_type in ("ConvTranspose", "Gemm") else side - 2


def _is_table(tensor: TensorProto) -> bool:
    return tensor.data_type in _FLOATS and len(tensor.dims) > 1 and math.prod(tensor.dims) >= _TABLE


def _unreadable(scope: Scope, target: Target) -> Refusal | None:
    """Why `target` does not take integer weights there; None if it does."""
    if not target.weight_only:
        return Refusal(f"--target {target.name} takes integer weights beside quantized data alone")
    owner = next((n for n in scope.owners if n.op_type in target.closed), None)
    if owner is None:
        return None
    return Refusal(f"--target {target.name} does not decode weights for the body of a {owner.op_type}")


def _unfit(tensor: TensorProto, axes: Sequence[int]) -> Refusal | None:
    """Why a stored tensor stays in float; None if it need not."""
    unfit = not_a_matrix(tensor)
    if unfit is not None:
        return unfit
    elements, scales = math.prod(tensor.dims), math.prod(tensor.dims[k] for k in axes)
    if elements + 4 * scales + _NODES >= 4 * elements:
        return Refusal(f"its weight is so small ({elements} elements) that integers and scales would take more bytes")
    return not_finite(tensor)


def _readers(nodes: Iterable[NodeProto], tensors: Mapping[str, object]) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {name: [] for name in tensors}
    for node in nodes:
        for name in dict.fromkeys(node.input):
            if name in found:
                found[name].append(node)
    return found
