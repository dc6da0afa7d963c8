"""Weights that are stored in integers though no curve tells what that does.

These are embedding tables, recurrent cells, stacks of matrices, and layers in the bodies of If, Loop and Scan:

    w ≈ s·q,  |q| ≤ 127, one s for each row of a table, gate unit of a cell and direction, or output channel

The search gives fewer bits to what it knows can spare them. These it does not measure, so they get 8, unless a pin says
otherwise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from rdoq_onnx.analysis.patterns import Excludes, channel_range, matches
from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.analysis.weight_origins import Origin, Scope, origins, walk
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.graph import SIZES, Graph, attribute
from rdoq_onnx.model.protos import all_outputs
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
class _Slot:
    """Weights as a node takes them: a stored tensor that they come from, or why they stay in float.

    along: the axes of the input along which rows, gate units or channels lie; from the last if negative. unsearched:
    why the search does not reach it.
    """

    node: NodeProto
    given: Origin | str
    along: tuple[int, ...]
    unsearched: str

    @property
    def name(self) -> str:
        return self.node.name or str(self.node.output[0])

    def skip(self, reason: str) -> Skip:
        return Skip(self.name, self.node.op_type, reason)


def is_stack(node: NodeProto, graph: Graph) -> bool:
    """Whether `node`, of the main graph, multiplies with stored matrices, more than one."""
    stored = [graph.initializers[i] for i in node.input if i in graph.initializers]
    constant = [i for i in node.input if i in graph.constants]
    return node.op_type == "MatMul" and len(stored) == len(constant) == 1 and len(stored[0].dims) > 2


def weight_only(
    graph: Graph,
    layer_types: Sequence[str],
    searched: Mapping[str, Sequence[str]],
    target: Target,
    excludes: Excludes,
) -> tuple[tuple[WeightOnly, ...], tuple[Skip, ...]]:
    """What is quantized outside the search, and the nodes with weights that stay in float after all.

    searched: the nodes of each weight that the search quantizes, which have integers of their own.
    """
    nodes = list(walk(graph.model.graph))  # held, so that the `id` of a node stays its own
    skipped: dict[Skip, None] = {}
    found: dict[str, list[tuple[_Slot, Origin]]] = {}
    slots = [(slot, around) for node, around in nodes for slot in _slots(node, around, graph, layer_types)]
    for slot, scope in slots:
        origin = slot.given
        if isinstance(origin, str):
            excludes.reason(slot.node.op_type, (slot.name,))
            skipped[slot.skip(origin)] = None
            continue
        excluded = excludes.reason(slot.node.op_type, (slot.name, origin.tensor.name))
        refusal = excluded or _unreadable(scope, target) or _refusal(origin.tensor, _axes(slot, origin))
        if refusal:
            skipped[slot.skip(refusal)] = None
        else:
            found.setdefault(origin.tensor.name, []).append((slot, origin))
    readers = _readers([node for node, _ in nodes], found)
    exposed = {o.name for o in all_outputs(graph.model.graph)}
    chosen = []
    for tensor, several in found.items():
        own = {id(origin.reader) for _, origin in several}
        others = [n for n in readers[tensor] if id(n) not in own and n.op_type not in SIZES]
        other = next((n for n in others if n.name not in searched.get(tensor, ())), None)
        if other is not None or tensor in exposed:
            use = "is an output" if other is None else f"also feeds {other.op_type} {other.name or other.output[0]!r}"
            reason = f"its weight {tensor!r} {use}, which takes it in float"
            skipped.update(dict.fromkeys(slot.skip(reason) for slot, _ in several))
        else:
            chosen.append(_chosen([slot for slot, _ in several], several[0][1]))
    return tuple(chosen), tuple(skipped)


def _chosen(slots: Sequence[_Slot], origin: Origin) -> WeightOnly:
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


def _slots(node: NodeProto, scope: Scope, graph: Graph, layer_types: Sequence[str]) -> Iterator[_Slot]:
    if node.domain not in ("", "ai.onnx"):
        return
    owner = scope.owners[-1] if scope.owners else None
    inside = f"it is in the body of {owner.op_type} {owner.name or owner.output[0]!r}" if owner is not None else ""
    if node.op_type in RECURRENT:
        for index in (1, 2):
            given = origins(node.input[index], node, scope)
            yield from _each(node, given, (0, 1), inside or "a recurrent cell feeds its errors back")
    elif node.op_type == "Gather":
        given = origins(node.input[0], node, scope)
        if not isinstance(given, str) and all(_is_table(origin.tensor) for origin in given):
            yield from _each(node, given, (attribute(node, "axis", 0),), inside or "its rows are looked up")
    elif is_stack(node, graph) or (inside and node.op_type in layer_types):
        side, given = _constant_side(node, scope)
        yield from _each(node, given, (_channel_axis(node, side),), inside or "it is a stack of matrices")


def _each(
    node: NodeProto, given: tuple[Origin, ...] | str, along: tuple[int, ...], unsearched: str
) -> Iterator[_Slot]:
    for one in (given,) if isinstance(given, str) else given:
        yield _Slot(node, one, along, unsearched)


def _axes(slot: _Slot, origin: Origin) -> tuple[int, ...]:
    """The axes of the stored tensor along which the slot's lie."""
    rank = len(origin.axes)
    found = {origin.axes[a] for a in slot.along if -rank <= a < rank}
    return tuple(sorted(k for k in found if k is not None))


def _constant_side(node: NodeProto, scope: Scope) -> tuple[int, tuple[Origin, ...] | str]:
    """Which input holds the weight, and where that comes from: the first only where a MatMul has no other."""
    given = origins(node.input[1], node, scope)
    if node.op_type == "MatMul" and isinstance(given, str):
        left = origins(node.input[0], node, scope)
        if not isinstance(left, str):
            return 0, left
    return 1, given


def _channel_axis(node: NodeProto, side: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return 1 if node.op_type in ("ConvTranspose", "Gemm") else side - 2


def _is_table(tensor: TensorProto) -> bool:
    return tensor.data_type in _FLOATS and len(tensor.dims) > 1 and math.prod(tensor.dims) >= _TABLE


def _unreadable(scope: Scope, target: Target) -> str:
    """Why `target` does not take integer weights there; empty if it does."""
    if not target.weight_only:
        return f"--target {target.name} takes integer weights beside quantized data alone"
    owner = next((n for n in scope.owners if n.op_type in target.closed), None)
    return "" if owner is None else f"--target {target.name} does not decode weights for the body of a {owner.op_type}"


def _refusal(tensor: TensorProto, axes: Sequence[int]) -> str:
    """Why a stored tensor stays in float; empty if it need not."""
    if tensor.data_type != TensorProto.FLOAT:
        return f"its weight is {TensorProto.DataType.Name(tensor.data_type)}, not FLOAT; export it in float32"
    if len(tensor.dims) < 2:
        return f"its weight has {len(tensor.dims)} dimensions, too few for a matrix; reshape it"
    elements, scales = math.prod(tensor.dims), math.prod(tensor.dims[k] for k in axes)
    if elements + 4 * scales + _NODES >= 4 * elements:
        return f"its weight is so small ({elements} elements) that integers and scales would take more bytes"
    if not np.isfinite(numpy_helper.to_array(tensor)).all():
        return "its weight holds NaN or infinity; train or export it again"
    return ""


def _readers(nodes: Sequence[NodeProto], tensors: Mapping[str, object]) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {name: [] for name in tensors}
    for node in nodes:
        for name in dict.fromkeys(node.input):
            if name in found:
                found[name].append(node)
    return found
