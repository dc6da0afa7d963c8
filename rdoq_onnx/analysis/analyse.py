"""What there is to quantize in a normalized model, and why the rest is left in float.

A *layer* is a Conv, ConvTranspose, Gemm or MatMul with a constant weight. An *activation* is a tensor that feeds a
layer, taken where its values are made: behind the activation function and before operators that only move values
(MaxPool, Reshape, Concat of quantized parts, ...), which commute with the quantizer. A *fusion tensor* is quantized at
8 bits for one reason: ONNX Runtime's integer convolution wants a quantized output.
"""


import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rdoq_onnx.analysis.activations import find_activations, find_branches, find_sums
from rdoq_onnx.analysis.network import Network, layer_names
from rdoq_onnx.analysis.patterns import Excludes, channel_range, matches, nearest
from rdoq_onnx.analysis.skips import Skip, integer_kernels
from rdoq_onnx.analysis.weight_only import RECURRENT, is_stack, weight_only
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError, ModelError
from rdoq_onnx.model.graph import MOVES, Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES, Activation, Layer, Use
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.branch_consumers import BranchReaders
from rdoq_onnx.targets import TARGETS


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
        sums = find_sums(graph, layers) if target.sums else {}
        activations = find_activations(graph, layers, sums)
        branches = find_branches(graph, layers, activations, sums)
        if branches:
            return analyse(run_passes([BranchReaders(branches)], model), config)
    network = Network(model, layers, activations, skipped, target, others)
    _check_pins(network, config)
    return network


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


