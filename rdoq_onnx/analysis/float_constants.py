"""Find the constants that a model keeps in float, whatever reads them, so that none stays there unnoticed."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx
from onnx import NodeProto, TensorProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.analysis.weight_origins import Scope, walk
from rdoq_onnx.model.graph import MOVEMENT, attribute
from rdoq_onnx.model.layers import LAYER_TYPES, SCALING
from rdoq_onnx.model.protos import all_names
from rdoq_onnx.passes.packing.decoding import PACKED

LARGE = 200  # elements: a constant of more is listed
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_STANDARD = frozenset({"", "ai.onnx"})
_PACKED_PRODUCTS = frozenset({"GatherBlockQuantized", "MatMulNBits"})
_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})
# Operators whose output holds the values of their input, in another form or together with others.
_CARRIERS = MOVEMENT | {"Cast", "Concat", "Identity"}
_ROTARY = frozenset({"GroupQueryAttention", "RotaryEmbedding"})
_ELEMENTWISE = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "PRelu", "Sub", "Where"})

Use = tuple[NodeProto, int]  # a node and the index of its input


def left_in_file(model: onnx.ModelProto, network: Network, listed: Iterable[Skip]) -> tuple[Skip, ...]:
    """Return the nodes of the emitted `model` that read large float constants, and why, without those `listed`."""
    original = set(all_names(network.model.graph))
    made = {t.name for t in model.graph.initializer if t.name.startswith(PACKED)} - original
    return tuple(_skips(model, made, {s.node for s in listed}))


def left_by_plan(network: Network) -> tuple[Skip, ...]:
    """Return the nodes of a network not yet quantized that will read large float constants, as far as is known."""
    quantized = {layer.weight for layer in network.weights}
    if network.activations and network.target.integer_biases:
        nodes = {u.node for layer in network.layers for u in layer.uses}
        quantized.update(i for n in network.model.graph.node if n.name in nodes for i in n.input[2:])
    return tuple(_skips(network.model, quantized, {s.node for s in network.skipped}))


def _skips(model: onnx.ModelProto, known: Collection[str], listed: Collection[str]) -> Iterator[Skip]:
    """Yield a Skip for each node and reason. known: constants that need not be listed; listed: nodes neither."""
    nodes = list(walk(model.graph))
    uses: dict[str, list[Use]] = {}
    for node, _ in nodes:
        for index, name in enumerate(node.input):
            uses.setdefault(name, []).append((node, index))
    found: dict[Skip, None] = {}
    for node, scope in nodes:
        for index, name in enumerate(node.input):
            shape = _large(name, scope) if name not in known else None
            for user, at in _users((node, index), uses) if shape is not None else ():
                name = user.name or str(user.output[0])
                if name not in listed and not _is_scale(user, at, scope, uses):
                    found[Skip(name, user.op_type, _reason(user, shape or ()))] = None
    yield from found


def _large(name: str, scope: Scope) -> tuple[int, ...] | None:
    """Return the shape of a large float constant; None if `name` is none."""
    producer = scope.producers.get(name)
    tensor = scope.stored.get(name) if producer is None else None
    if producer is not None and producer.op_type == "Constant":
        tensor = attribute(producer, "value", None)
        count = len(attribute(producer, "value_floats", ()))
        tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[count]) if count else tensor
    if tensor is None or tensor.data_type not in _FLOATS or math.prod(tensor.dims) <= LARGE:
        return None
    return tuple(tensor.dims)


def _users(use: Use, uses: dict[str, list[Use]]) -> list[Use]:
    """Return what computes with the values that `use` reads: the ends of chains of nodes that only carry them on."""
    found: list[Use] = []
    pending, seen = [use], set()
    while pending:
        node, index = pending.pop()
        carries = node.op_type in _CARRIERS and node.domain in _STANDARD
        after = [u for name in node.output for u in uses.get(name, ())] if carries and id(node) not in seen else []
        seen.add(id(node))
        if after:
            pending += after
        elif not carries or not found:
            found.append((node, index))
    return found


def _is_scale(node: NodeProto, index: int, scope: Scope, uses: Mapping[str, list[Use]]) -> bool:
    """Whether input `index` of `node` is the scale of a quantizer, a factor of one, or that of integers cast to float.

    A bias's scale is the product of its weight's and the activation's.
    """
    if node.op_type in _QUANTIZERS:
        return index == 1
    if node.op_type in _PACKED_PRODUCTS:
        return index == 2
    if node.op_type != "Mul":
        return False
    after = uses.get(node.output[0], [])
    if after and all(user.op_type in _QUANTIZERS and at == 1 for user, at in after):
        return True
    other = scope.producers.get(node.input[1 - index])
    if other is None or other.op_type != "Cast":
        return False
    source = scope.stored.get(other.input[0])
    return other.input[0] in scope.producers if source is None else source.data_type not in _FLOATS


def _reason(node: NodeProto, shape: tuple[int, ...]) -> str:
    if node.op_type == "Mul" and node.name.endswith(SCALING):
        return "inserted: it scales the channels for the quantizer behind it, as nothing absorbs their scales"
    if max(shape) == math.prod(shape):
        return "a vector that it reads, such as a bias or a scale, stays in float: it is small beside a matrix"
    if node.op_type in _ROTARY:
        return "the angles of rotary positions stay in float"
    if node.domain not in _STANDARD:
        return f"weights of {node.domain} operators are not quantized; export the model before any fusion"
    if node.op_type in _ELEMENTWISE:
        return "an array that it combines element by element is not the weight of a layer"
    if node.op_type in LAYER_TYPES:
        return "an array that it reads is not quantized"
    return f"weights of {node.op_type} are not quantized; only those of {', '.join(LAYER_TYPES)} and the like are"
