"""Weights that are stored as integers without a curve that measures the effect.

These are embedding tables, recurrent cells, stacks of matrices, and layers in the bodies of If, Loop and Scan:

    w ≈ s·q,  |q| ≤ 127, one s per row of a table, gate unit of a cell and direction, or output channel

The search lowers the width only of weights whose effect it has measured. It does not measure these, so they get 8 bits
unless pinned.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from rdoq_onnx.analysis.patterns import channel_range, matches
from rdoq_onnx.analysis.skips import Excludes, Finiteness, Refusal, Skip, not_a_matrix
from rdoq_onnx.analysis.weight_origins import Origin, Scope, origins, walk
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.graph import SHAPE_OPS, Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.protos import all_nodes, all_outputs
from rdoq_onnx.targets import Target

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
BITS = 8
NARROWEST = 2  # bits: smallest width that a pin may set
_TABLE = 1024  # elements: smallest embedding; smaller tables are shape arithmetic
_NODES = 256  # approximate bytes of the nodes and names that decode a tensor
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


@dataclass(frozen=True)
class WeightOnly:
    """A float initializer, the nodes that apply it, and why the search does not cover it. Named after its first node.

    axes: the axes along which scales differ.
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
        """The names that `--pin` and `--exclude` accept for it."""
        return (*self.nodes, self.tensor)


@dataclass(frozen=True)
class Slot:
    """An initializer that a node takes weights from, or why these stay in float.

    scope: the scope of the node's graph. along: axes of the input along which rows, gate units or channels lie;
    negative ones count from the last. unsearched: why the search does not cover it.
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
    """Find the slots of weights that the search does not cover, in the main graph and in nested bodies."""
    return tuple(slot for node, scope in walk(graph.model.graph) for slot in _slots(node, scope, graph))


def weight_only(
    graph: Graph,
    slots: Sequence[Slot],
    searched: Mapping[str, Sequence[str]],
    target: Target,
    excludes: Excludes,
    finiteness: Finiteness,
) -> tuple[tuple[WeightOnly, ...], tuple[Skip, ...]]:
    """The weights in `slots` that are quantized outside the search, and the nodes whose weights stay in float.

    searched: for each weight that the search quantizes its nodes, which have integers of their own.
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
        other = next((n for n in others if n.name not in searched.get(tensor, ())), None)
        if other is not None or tensor in exposed:
            use = "is an output" if other is None else f"also feeds {other.op_type} {other.name or other.output[0]!r}"
            refusal = Refusal(f"its weight {tensor!r} {use}, which needs it in float")
            skipped.update(dict.fromkeys(slot.skip(refusal) for slot, _ in users))
        else:
            chosen.append(_chosen([slot for slot, _ in users], users[0][1]))
    return tuple(chosen), tuple(skipped)


def _quantizable(slot: Slot, target: Target, excludes: Excludes, finiteness: Finiteness) -> Origin | Refusal:
    """The slot's origin, unless it is excluded or unfit, or `target` cannot decode it."""
    origin = slot.origin
    if isinstance(origin, Refusal):
        return origin
    excluded = excludes.refusal(slot.node.op_type, slot.names)
    unfit = excluded or _unreadable(slot.scope, target) or _unfit(origin.tensor, _axes(slot, origin))
    return unfit or finiteness(origin.tensor) or origin


def _chosen(slots: Sequence[Slot], origin: Origin) -> WeightOnly:
    """The weight that the slots share; `origin` is that of the first slot."""
    first, tensor = slots[0], origin.tensor
    names = tuple(dict.fromkeys(s.name for s in slots))
    return WeightOnly(
        first.name, first.node.op_type, tensor.name, tuple(tensor.dims), _axes(first, origin), first.unsearched, names
    )


def widths(unsearched: Sequence[WeightOnly], pins: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """The width of each weight: 8 bits, or that of its last pin. Raises ConfigError for a pin below 2 bits."""
    result = []
    for weights in unsearched:
        bits = BITS
        for pattern, pinned in pins:
            if channel_range(pattern)[1] is None and matches(pattern, weights.names):
                if pinned < NARROWEST:
                    found = f"--pin {pattern}={pinned}: {weights.name!r} is quantized without measuring the effect"
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
            sources = origins(node.input[index], node, scope)
            yield from _each(node, scope, sources, (0, 1), inside or "a recurrent cell feeds its errors back")
    elif node.op_type == "Gather":
        sources = origins(node.input[0], node, scope)
        if not isinstance(sources, Refusal) and all(_is_table(origin.tensor) for origin in sources):
            yield from _each(node, scope, sources, (attribute(node, "axis", 0),), inside or "its rows are looked up")
    elif is_stack(node, graph) or (inside and node.op_type in LAYER_TYPES):
        side, sources = _constant_side(node, scope)
        yield from _each(node, scope, sources, (_channel_axis(node, side),), inside or "it is a stack of matrices")


def _each(
    node: NodeProto, scope: Scope, sources: tuple[Origin, ...] | Refusal, along: tuple[int, ...], unsearched: str
) -> Iterator[Slot]:
    for origin in (sources,) if isinstance(sources, Refusal) else sources:
        yield Slot(node, scope, origin, along, unsearched)


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
