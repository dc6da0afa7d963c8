"""Normalize a model to the one form that the other passes and the analysis expect.

Exporters store a weight as an initializer, a Constant node, an initializer with an Identity after it, or an optional
graph input. Afterwards it is always an initializer.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, inliner, version_converter
from onnx.helper import find_min_ir_version_for, make_tensor

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import surgeon
from rdoq_onnx.model.protos import default_opset
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.model.surgeon import Graph, Node
from rdoq_onnx.passes import Pass, one_line

# From this IR version on, initializers need not be listed as graph inputs.
_FREE_INITIALIZERS = 4
# Elements. The version converter may need the values of small tensors (axes, pads, scales); larger ones are withheld.
_SMALL = 1024

_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "value": lambda value: value,
    "value_float": lambda value: np.array(value, np.float32),
    "value_floats": lambda value: np.array(value, np.float32),
    "value_int": lambda value: np.array(value, np.int64),
    "value_ints": lambda value: np.array(value, np.int64),
    "value_string": lambda value: make_tensor("", TensorProto.STRING, [], [value.encode()]),
    "value_strings": lambda ts: make_tensor("", TensorProto.STRING, [len(ts)], [t.encode() for t in ts]),
}


@dataclass(frozen=True)
class Normalize(Pass):
    """Turn constants (also reshaped ones) into initializers, remove Identity and idle Dropout, make node names unique.

    Assumes a valid model. Works on the main graph; subgraphs and functions stay unchanged, unless the opset is raised,
    or lowered to `latest`: then subgraphs are converted and functions inlined. Leaves a Constant that is sparse or a
    graph output, and an Identity between a graph input or a weight and a graph output. Removes weights from the graph
    inputs, so that they cannot be overridden. Negative sizes of inputs and outputs become free.
    """

    opset: int = 13
    latest: int = 27  # ONNX Runtime 1.32 does not implement QuantizeLinear of opset 28

    def __call__(self, model: ModelProto) -> ModelProto:
        result = surgeon.edit(model, _tidy)
        _close_weights(result.graph)
        _free_sizes(result.graph)
        raise_ir_version(result)
        opset = default_opset(result)
        target = min(max(opset, self.opset), self.latest)
        if opset and opset != target:
            result = surgeon.edit(raise_opset(result, target), _tidy)
            raise_ir_version(result)
        _name_nodes(result.graph)
        return result

    def ensures(self, model: ModelProto) -> None:
        names = Counter(node.name for node in model.graph.node)
        if names and (names[""] or max(names.values()) > 1):
            raise ModelError("some nodes still have no name or a duplicate one")
        if 0 < default_opset(model) < self.opset:
            raise ModelError(f"the opset is still {default_opset(model)}")


def _tidy(graph: Graph) -> None:
    exposed = surgeon.exposed(graph)
    for node in graph.nodes:
        forms = [name for name in _CONSTANTS if name in node.attrs]
        if _is(node, "Constant") and forms and id(node.outputs[0]) not in exposed:
            surgeon.freeze(node.outputs[0], _CONSTANTS[forms[0]](node.attrs[forms[0]]))
        elif _is(node, "Reshape") and id(node.outputs[0]) not in exposed:
            _reshape_weight(node)
    for node in graph.nodes:
        if _is(node, "Identity") or (_is(node, "Dropout") and _idle(graph, node)):
            surgeon.bypass(graph, node)


def _reshape_weight(node: Node) -> None:
    """Fold a Reshape of a constant: some exporters store a bias as [C] and reshape it to [1, C, 1, 1] at each run."""
    data, shape = surgeon.values(node.inputs[0]), surgeon.values(node.inputs[1])
    if data is not None and shape is not None:
        keep = not node.attrs.get("allowzero", 0)
        sizes = [data.shape[i] if keep and size == 0 else int(size) for i, size in enumerate(shape)]
        surgeon.freeze(node.outputs[0], data.reshape(sizes))


def _is(node: Node, op: str) -> bool:
    return bool(node.op == op and surgeon.standard(node))


def _idle(graph: Graph, dropout: Node) -> bool:
    """Whether a Dropout passes its input through: it does not in training mode or if its mask is read."""
    if any(t.name and (t.outputs or id(t) in surgeon.exposed(graph)) for t in dropout.outputs[1:]):
        return False
    if graph.opset < 7:
        return bool(dropout.attrs.get("is_test", 0))
    if len(dropout.inputs) < 3 or dropout.inputs[2].is_empty():
        return True
    training = surgeon.values(dropout.inputs[2])
    return training is not None and not training.any()


def _close_weights(graph: GraphProto) -> None:
    weights = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in weights:
            del graph.input[index]


def _free_sizes(graph: GraphProto) -> None:
    """Clear negative sizes, by which some exporters mean any size."""
    for value in (*graph.input, *graph.value_info, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value < 0:
                size.ClearField("dim_value")


def raise_ir_version(model: ModelProto) -> None:
    needed: int = find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(model.ir_version, needed, _FREE_INITIALIZERS)


def raise_opset(model: ModelProto, opset: int) -> ModelProto:
    """Convert the model to `opset` with onnx's version converter; functions are inlined. Raises ModelError."""

    def convert(source: ModelProto) -> ModelProto:
        if source.functions:  # the converter drops them, and the checker requires one opset for all
            source = inliner.inline_local_functions(source)
        return version_converter.convert_version(source, opset)

    try:
        return without_weights(model, convert)
    except Exception as error:  # the converter raises RuntimeError, ConvertError, and others
        present = default_opset(model)
        moved, fix = ("raised", "later") if present < opset else ("lowered", "earlier")
        raise ModelError(
            f"opset {present} could not be {moved} to {opset}: {one_line(error)}; "
            f"export the model again with opset {opset} or {fix}"
        ) from error


def without_weights(model: ModelProto, change: Callable[[ModelProto], ModelProto]) -> ModelProto:
    """Apply `change` to `model` with large weights replaced by inputs, and put them back.

    onnx serializes models for such changes, which protobuf cannot do from 2 GiB on.
    """
    result = change(weights_as_inputs(model, larger_than=_SMALL))
    large = [t for t in model.graph.initializer if math.prod(t.dims) > _SMALL]
    names = {t.name for t in large}
    for index in reversed(range(len(result.graph.input))):
        if result.graph.input[index].name in names:
            del result.graph.input[index]
    for tensor in large:
        result.graph.initializer.add().CopyFrom(tensor)
    return result


def _name_nodes(graph: GraphProto) -> None:
    """Number nodes without a name and all but the first node of each name."""
    taken = {node.name for node in graph.node}
    seen, count = {""}, Counter[str]()
    for node in graph.node:
        if node.name in seen:
            stem = node.name or node.op_type
            while f"{stem}_{count[stem]}" in taken:
                count[stem] += 1
            node.name = f"{stem}_{count[stem]}"
            taken.add(node.name)
        seen.add(node.name)
