"""The parts of a network's outputs: what is measured apart, since its unit is its own.

A mean over all output elements is the loudest one's. So each output is a part, and so is each tensor that a Concat puts
into an output (behind it operators that move values, and Mul or Add by constants); each part weighs the same. Constants
and copies of inputs are no part. In front of an operator that selects by value (TopK, NonMaxSuppression, NonZero, ...)
what it selects by and from is measured: which rows it picks, and so what an element means, changes from run to run.
The caches and states that the next call reads back are one part together.

For a Softmax or Sigmoid its input is measured: a saturated Softmax has a vanishing gradient, so that no perturbation
seems to matter, though large ones do. A map of Sigmoids (made by a convolution) is measured as it is: some of it is
always on the slope, and what becomes of the rest, far out, says nothing of the map.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx

from rdoq_onnx.model.graph import SHAPE_OPS, Graph, behind, is_movement
from rdoq_onnx.model.layers import LAYER_TYPES
from rdoq_onnx.model.protos import reads
from rdoq_onnx.observation.logits import class_axis

Kind = Literal["whole", "joined", "selected"]

CACHES = "caches"
MAX_PIECES = 16  # an output of more of them (an unrolled loop) is one part
_SATURATES = frozenset({"Sigmoid", "Softmax"})
_NOT_FLOAT32 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_SPATIAL = frozenset({"Conv", "ConvTranspose", "Resize"})
_RESHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_SCALES = frozenset({"Add", "Div", "Mul", "Sub"})
SELECTORS = frozenset({"ArgMax", "ArgMin", "Compress", "NonMaxSuppression", "NonZero", "TopK", "Unique"})
_NEXT = ("n", "N", "_n", "_out", "Out", "_next", "_new")  # behind the name of a state: what becomes of it
_COMPARISONS = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"})


@dataclass(frozen=True)
class Piece:
    """One tensor of a part.

    measured: the tensor whose distortion is measured. value: the one whose SQNR is reported. output: the graph output
    that holds it. kind: "whole" where `value` is that output, "joined" where a Concat puts it in there, "selected"
    where the output is selected from it, or by it. classes: the axis of `measured` whose rows are logits, if any.
    """

    measured: str
    value: str
    output: str
    kind: Kind
    classes: int | None = None


@dataclass(frozen=True)
class Part:
    """Tensors that weigh as one. cached: whether the next call reads them back."""

    name: str
    pieces: tuple[Piece, ...]
    cached: bool = False

    @property
    def output(self) -> str:
        """The output that holds it; of several, the first and their number."""
        names = list(dict.fromkeys(p.output for p in self.pieces))
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def find_parts(model: onnx.ModelProto) -> tuple[Part, ...]:
    """The parts of the outputs of `model`, in order; of types that are not known yet."""
    outputs = Outputs(model)
    parts: dict[str, Part] = {}
    caches: dict[str, Piece] = {}
    cached = {o.name for o in model.graph.output if outputs.is_cache(o.name)}
    for output in model.graph.output:
        pieces = outputs.pieces(output.name)
        if output.name in cached:
            caches |= {p.measured: p for p in pieces}
        else:
            found = outputs.with_classes(pieces, output, len(model.graph.output) - len(cached) == 1)
            parts |= {p.measured: Part(p.value, (p,)) for p in found if p.measured not in parts}
    name = CACHES if len(caches) > 1 else next(iter(caches), "")
    return (*parts.values(), *((Part(name, tuple(caches.values()), True),) if caches else ()))


def whole(outputs: Iterable[str]) -> tuple[Part, ...]:
    """Each of `outputs` as a part of its own, measured as it is."""
    return tuple(Part(name, (Piece(name, name, name, "whole"),)) for name in outputs)


def measured_tensors(parts: Sequence[Part]) -> list[str]:
    """The tensors that distortion is measured of."""
    return list(dict.fromkeys(piece.measured for part in parts for piece in part.pieces))


class Outputs:
    """Where the values of each output come from."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = Graph(model)
        self._fixed = _value_free(self._graph)
        self._selected = _selected(self._graph)
        self._states = {i.name for i in model.graph.input}

    def pieces(self, output: str) -> list[Piece]:
        """The tensors that `output` is measured by; none if it is a constant or a copy of an input."""
        end = self.end(output)
        if end in self._selected:
            cuts = dict.fromkeys(leaf for cut in self._cuts(end) for leaf in self._parted(cut))
            return [self._piece(cut, output, "selected") for cut in cuts]
        leaves = self.leaves(end)
        computed = [leaf for leaf in leaves if self._is_computed(leaf)]
        if not computed:
            return []
        if len(leaves) == 1 or len(computed) > MAX_PIECES:
            return [Piece(self._logits(end), output, output, "whole")]
        return [self._piece(leaf, output, "joined") for leaf in computed]

    def with_classes(self, pieces: list[Piece], output: onnx.ValueInfoProto, alone: bool) -> list[Piece]:
        """Return the `pieces` of `output` with the axis of their classes; alone: as in `class_axis`."""
        if len(pieces) != 1 or pieces[0].kind != "whole":
            return pieces
        return [replace(pieces[0], classes=class_axis(self._graph, output, pieces[0].measured, alone))]

    def leaves(self, tensor: str) -> tuple[str, ...]:
        """The tensors that are joined into `tensor`, behind operators that move values and Mul and Add by constants."""
        return tuple(self._walk(tensor)[1])

    def tail(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes between the `leaves` of `tensor` and it, in order of execution."""
        names = set(self._walk(tensor)[0])
        return [node for node in self._graph.nodes if not names.isdisjoint(node.output)]

    def end(self, output: str) -> str:
        """What an output of another type is cast from (see passes/normalization/widen_floats.py); else itself."""
        node = self._graph.producer.get(output)
        cast = node is not None and node.op_type == "Cast" and node.attribute[0].i in _NOT_FLOAT32
        return node.input[0] if node is not None and cast else output

    def is_cache(self, output: str) -> bool:
        """Whether the next call reads `output` back: it carries an input on, or is named as what becomes of one."""
        leaves = self.leaves(self.end(output))
        if len(leaves) == 2 and leaves[0] in self._graph.inputs:
            return True
        names = {output.replace("present", past) for past in ("past", "past_key_values")} - {output}
        return bool(names & self._states) or any(output == name + end for name in self._states for end in _NEXT)

    def _sources(self, tensor: str) -> list[str]:
        """What the values of `tensor` are moved, scaled, shifted or joined from by its producer; none if by no such."""
        node = self._graph.producer.get(tensor)
        if node is None or tensor in self._fixed:
            return []
        if node.op_type == "Concat":
            return list(node.input)
        if node.op_type in ("Identity", "Cast") or (is_movement(node, self._graph) and node.op_type != "MaxPool"):
            return [node.input[0]]
        varying = [i for i in node.input if i not in self._fixed]
        return varying if node.op_type in _SCALES and len(varying) == 1 else []

    def _walk(self, tensor: str) -> tuple[list[str], list[str]]:
        """The tensors from `tensor` up to its leaves, and the leaves, in the order in which they are joined."""
        walked: dict[str, None] = {}
        leaves: dict[str, None] = {}
        pending = [tensor]
        while pending:
            name = pending.pop()
            if name not in walked and name not in leaves:
                sources = self._sources(name)
                (walked if sources else leaves)[name] = None
                pending += reversed(sources)
        return list(walked), list(leaves)

    def _cuts(self, tensor: str) -> list[str]:
        """The tensors in front of the selection that `tensor` depends on."""
        cuts: dict[str, None] = {}
        seen: set[str] = set()
        pending = [tensor]
        while pending:
            name = pending.pop()
            node = self._graph.producer.get(name)
            if node is None or name in seen or name in self._fixed:
                continue
            seen.add(name)
            if name in self._selected or self._compares(name):
                pending += [i for i in node.input if i]
            else:
                cuts[name] = None
        return list(cuts)

    def _compares(self, tensor: str) -> bool:
        """Whether `tensor` is the result of a comparison, moved or not."""
        source = self.leaves(tensor)[0]
        return source in self._graph.producer and self._graph.producer[source].op_type in _COMPARISONS

    def _parted(self, tensor: str) -> list[str]:
        leaves = self.leaves(tensor)
        computed = [leaf for leaf in leaves if self._is_computed(leaf)]
        return [tensor] if len(leaves) == 1 or len(computed) > MAX_PIECES else computed

    def _is_computed(self, tensor: str) -> bool:
        return tensor not in self._fixed and tensor in self._graph.producer

    def _piece(self, value: str, output: str, kind: Kind) -> Piece:
        return Piece(self._logits(value), value, output, kind)

    def _logits(self, tensor: str) -> str:
        """What a Softmax or Sigmoid makes `tensor` of; `tensor` where none does, or for a map of Sigmoids."""
        producer = self._graph.producer
        maker = behind(tensor, _RESHAPES, producer)
        saturates = maker is not None and maker.op_type in _SATURATES and not _is_map(maker, producer)
        return maker.input[0] if maker is not None and saturates else tensor


def _value_free(graph: Graph) -> set[str]:
    """Tensors that depend on no value of an input: constants, and what is made of shapes."""
    fixed = set(graph.constants)
    for node in graph.nodes:
        if node.op_type in SHAPE_OPS or (node.input and all(i in fixed for i in reads([node]))):
            fixed.update(node.output)
    return fixed


def _selected(graph: Graph) -> set[str]:
    """Tensors behind the last layers that depend on what an operator selects by values that layers made."""
    last: set[str] = set()
    pending = list(graph.outputs)
    while pending:
        node = graph.producer.get(pending.pop())
        if node is not None and node.op_type not in LAYER_TYPES and last.isdisjoint(node.output):
            last.update(o for o in node.output if o)
            pending += [i for i in node.input if i]
    learned: set[str] = set()
    selected: set[str] = set()
    for node in graph.nodes:
        if node.op_type in SHAPE_OPS:
            continue
        if node.op_type in LAYER_TYPES or not learned.isdisjoint(node.input):
            learned.update(o for o in node.output if o)
        selects = node.op_type in SELECTORS and not learned.isdisjoint(node.input)
        if not last.isdisjoint(node.output) and (selects or not selected.isdisjoint(node.input)):
            selected.update(o for o in node.output if o)
    return selected


def _is_map(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> bool:
    source = behind(node.input[0], _RESHAPES | {"Add"}, producer)  # a bias
    return node.op_type == "Sigmoid" and source is not None and source.op_type in _SPATIAL
