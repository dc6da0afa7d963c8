"""What there is to quantize in a normalized model, and why the rest is left in float.

A *layer* is a Conv, ConvTranspose, Gemm or MatMul with a constant weight. An *activation* is a tensor that feeds a
layer, taken where its values are made: behind the activation function and before operators that only move values
(MaxPool, Reshape, Concat of quantized parts, ...), which commute with the quantizer. A *fusion tensor* is quantized at
8 bits for one reason: ONNX Runtime's integer convolution wants a quantized output.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError, ModelError
from rdoq_onnx.float_readers import quantized_readers
from rdoq_onnx.graph import MOVES, Graph, attribute, behind, behind_clamp, moves
from rdoq_onnx.linear import Linear
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.branch_readers import BRANCH, BranchReaders
from rdoq_onnx.patterns import Excludes, channel_range, matches, nearest
from rdoq_onnx.targets import TARGETS, Target
from rdoq_onnx.unquantized import Skip, integer_kernels
from rdoq_onnx.weight_only import RECURRENT, WeightOnly, is_stack, weight_only

LAYER_TYPES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that ONNX Runtime runs on integers when all their inputs are quantized.
FUSES = frozenset({"Add", "Concat"})
FUSION_BITS = 8


@dataclass(frozen=True)
class Use:
    """One node that applies a layer's weight. linear: how it unfolds its data, with strides and pads of its own."""

    node: str
    data: str
    output: str
    linear: Linear


@dataclass(frozen=True)
class Layer:
    """A weight, the nodes that apply it, and how it becomes rows. Named after its first node."""

    name: str
    weight: str
    linear: Linear
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Activation:
    """A tensor that a quantizer follows.

    feeds: the tensors that reach a layer with this tensor's values; empty for a fusion tensor.
    moved: tensors behind operators that only move its values, quantized once more (exactly) so that what reads them
        fuses too.
    parts: the tensors that a Concat joins into it, where no one else reads them; they are quantized in its stead.
    """

    tensor: str
    feeds: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def fusion(self) -> bool:
        return not self.feeds

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--pin` knows it by: its own, and that of the tensor that it is a branch of."""
        return (self.tensor, self.tensor.removesuffix(BRANCH))


@dataclass(frozen=True)
class Network:
    """The layers and activations of `model`, in graph order, and the rules that they are quantized by.

    skipped: nodes with weights that stay in float. weight_only: what is quantized outside the search.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    skipped: tuple[Skip, ...]
    target: Target = TARGETS["onnxruntime"]
    weight_only: tuple[WeightOnly, ...] = ()

    def rows(self, layer: Layer) -> NDArray[np.float32]:
        """The float weights of `layer` as rows, [units, K]."""
        return layer.linear.rows(numpy_helper.to_array(self._initializers[layer.weight]))

    @cached_property
    def sites(self) -> Mapping[str, str]:
        """Where first order measures each activation: behind the MaxPools that alone read it.

        They commute with a quantizer, and leave fewer elements.
        """
        graph = Graph(self.model)
        return {a.tensor: behind(a.tensor, graph, lambda node: node.op_type == "MaxPool") for a in self.activations}

    @cached_property
    def _initializers(self) -> dict[str, TensorProto]:
        return {t.name: t for t in self.model.graph.initializer}


def analyse(model: onnx.ModelProto, config: Config) -> Network:
    """The layers and activations of a normalized `model` that `config` asks to quantize.

    Raises ModelError if nothing can be quantized, ConfigError if a pattern matches nothing, or if a goal is given for
    the search and there is nothing to search.
    """
    graph = Graph(model)
    target, excludes = TARGETS[config.target], Excludes(config.exclude, config.exclude_ops)
    layers, skipped = _find_layers(graph, config, excludes)
    searched = {x.weight: [u.node for u in x.uses] for x in layers}
    others, left = weight_only(graph, LAYER_TYPES, searched, target, excludes)
    excludes.check()
    skipped = (*skipped, *integer_kernels(graph), *left)
    if not layers and not others:
        reasons = "; ".join(f"{s.op_type} {s.node!r}: {s.reason}" for s in skipped[:3])
        raise ModelError("the model has no layer to quantize" + (f" ({reasons})" if reasons else
                         f": no {', '.join(LAYER_TYPES)}, {', '.join(sorted(RECURRENT))} has a constant weight, and "
                         "nothing is gathered from a table"))
    goals = {"--size": config.size, "--sqnr": config.sqnr, "--top1-agreement": config.top1_agreement}
    for option in (name for name, goal in goals.items() if goal is not None and not layers):
        raise ConfigError(f"{option}: all weights are of a kind that takes 8 bits unsearched; leave that option out")
    activations: tuple[Activation, ...] = ()
    if config.activation_bits is not None:
        sums = _sums(graph, layers) if target.sums else {}
        activations = _find_activations(graph, layers, sums)
        branches = _branches(graph, layers, activations, sums)
        if branches:
            return analyse(run_passes([BranchReaders(branches)], model), config)
    network = Network(model, layers, activations, skipped, target, others)
    _check_pins(network, config)
    return network


def layer_names(layer: Layer) -> tuple[str, ...]:
    """The names that `--pin` and `--exclude` know a layer by: its nodes' and its weight's."""
    return (*(u.node for u in layer.uses), layer.weight)


def integer_ranges(model: onnx.ModelProto) -> dict[str, int]:
    """For each graph input that indexes a constant table (an embedding), the number of its rows."""
    graph = Graph(model)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type == "Gather" and node.input[0] in graph.initializers:
            source = node.input[1]
            while (maker := graph.producer.get(source)) is not None and maker.op_type in (*MOVES, "Cast"):
                source = maker.input[0]
            sizes, axis = graph.initializers[node.input[0]].dims, attribute(node, "axis", 0)
            if source in graph.inputs and -len(sizes) <= axis < len(sizes):
                rows = sizes[axis]
                found[source] = min(rows, found.get(source, rows))
    return found


def _find_layers(graph: Graph, config: Config, excludes: Excludes) -> tuple[tuple[Layer, ...], tuple[Skip, ...]]:
    found: dict[tuple[str, Linear], list[Use]] = {}
    skipped = []
    for node in graph.nodes:
        if node.op_type not in LAYER_TYPES or node.domain not in ("", "ai.onnx") or is_stack(node, graph):
            continue
        result = _read_layer(node, graph)
        excluded = excludes.reason(node.op_type, (node.name,) if isinstance(result, str) else (node.name, result[0]))
        if excluded and not isinstance(result, str):
            result = excluded
        if node.op_type in TARGETS[config.target].one_scale and not isinstance(result, str):
            result = f"--target {config.target} wants one scale for its weight, channels have scales of their own here"
        if isinstance(result, str):
            skipped.append(Skip(node.name, node.op_type, result))
        else:
            weight, linear = result
            use = Use(node.name, node.input[1 - linear.weight_side], node.output[0], linear)
            found.setdefault((weight, linear.matrix), []).append(use)
    layers = tuple(Layer(uses[0].node, w, linear, tuple(uses)) for (w, linear), uses in found.items())
    return layers, tuple(skipped)


def _read_layer(node: onnx.NodeProto, graph: Graph) -> tuple[str, Linear] | str:
    """The weight of a node and how it unfolds, or the reason why the node stays in float."""
    constant = [k for k in (0, 1) if node.input[k] in graph.constants]
    if not constant:
        return "both inputs are computed, so there is no weight"
    if len(constant) == 2:
        return "both inputs are constant; fold it when exporting"
    side = constant[0]
    if side == 0 and node.op_type != "MatMul":
        return "the constant is the data input, not the weight; swap them if the operator allows it"
    tensor = graph.initializers.get(node.input[side])
    if tensor is None:
        maker = _maker(node.input[side], graph)
        if maker == "DequantizeLinear":
            return "it is quantized already: its weight comes from a DequantizeLinear, and stays as it is"
        return f"its weight {node.input[side]!r} is computed from constants by a {maker}; fold it when exporting"
    if tensor.data_type != TensorProto.FLOAT:
        return f"its weight is {TensorProto.DataType.Name(tensor.data_type)}, not FLOAT; export it in float32"
    shape = tuple(tensor.dims)
    if len(shape) < 2:
        return f"its weight has {len(shape)} dimensions, too few for a matrix; reshape it"
    if 0 in shape:
        return "its weight is empty"
    if not np.isfinite(numpy_helper.to_array(tensor)).all():
        return "its weight holds NaN or infinity; train or export it again"
    return tensor.name, _linear(node, shape, side)


def _linear(node: onnx.NodeProto, shape: tuple[int, ...], side: int) -> Linear:
    if node.op_type == "MatMul":
        return Linear("MatMul", shape, weight_side=side)
    if node.op_type == "Gemm":
        return Linear(
            "Gemm",
            shape,
            trans_a=bool(attribute(node, "transA", 0)),
            trans_b=bool(attribute(node, "transB", 0)),
            alpha=float(attribute(node, "alpha", 1.0)),
        )
    return Linear(
        node.op_type,
        shape,
        group=attribute(node, "group", 1),
        strides=tuple(attribute(node, "strides", ())),
        dilations=tuple(attribute(node, "dilations", ())),
        pads=tuple(attribute(node, "pads", ())),
        auto_pad=attribute(node, "auto_pad", b"NOTSET").decode(),
        output_padding=tuple(attribute(node, "output_padding", ())),
        output_shape=tuple(attribute(node, "output_shape", ())[-(len(shape) - 2) :]),
    )


def _find_activations(graph: Graph, layers: Sequence[Layer], sums: Mapping[str, str]) -> tuple[Activation, ...]:
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


def _branches(
    graph: Graph, layers: Sequence[Layer], activations: Sequence[Activation], sums: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """What BranchReaders takes: the activations that some nodes had better read in float."""
    quantized = {t for a in activations for t in (a.tensor, *a.parts)}
    feeding = [a.tensor for a in activations if not a.fusion]
    integer = {*sums.values(), *(u.node for x in layers for u in x.uses)}
    return quantized_readers(graph, feeding, quantized, integer)


def _sums(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
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


def _check_pins(network: Network, config: Config) -> None:
    layers = [layer_names(layer) for layer in network.layers]
    tensors: list[tuple[str, ...]] = [a.names for a in network.activations] + [w.names for w in network.weight_only]
    for pattern, bits in config.pins:
        name, channels = channel_range(pattern)
        if not any(matches(name, n) for n in (layers if channels else layers + tensors)):
            known = [n for names in (layers if channels else layers + tensors) for n in names]
            raise ConfigError(f"--pin {pattern}={bits} matches no layer or activation{nearest(name, known)}")


def _maker(tensor: str, graph: Graph) -> str:
    node = graph.producer.get(tensor)
    return node.op_type if node is not None else "node outside this graph"


