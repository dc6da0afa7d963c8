"""Rows of logits among a network's outputs, and how far distributions over their classes diverge.

A row z of logits gives the distribution p = softmax(z). What changes z to z̃ changes it by

    KL(p‖p̃) = Σ_c p_c (log p_c - log p̃_c) ≈ ½ Δzᵀ (diag p - p pᵀ) Δz.

An output is taken for rows of logits if a Softmax or LogSoftmax makes it, if it is the only one and holds a row of
scores for each sample, if it is named so, or if its last axis is as long as a table that an input looks rows up in: a
language model's vocabulary. Caches beside it do not count.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.model.graph import Graph, attribute
from rdoq_onnx.model.layers import LAYER_TYPES

Array = NDArray[Any]
Float = NDArray[np.float64]

EMBEDS = frozenset({"Div", "LayerNormalization", "LpNormalization", "Tanh"})  # the last node of an embedding
_DISTRIBUTIONS = frozenset({"LogSoftmax", "Softmax"})
_PASSED = frozenset({"Add", "Cast", "Identity"})  # between a layer and the logits that it makes
_MOVED = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_NAMED = "logits"


def class_axis(graph: Graph, output: onnx.ValueInfoProto, measured: str, alone: bool) -> int | None:
    """Return the axis of the classes of `measured`, the tensor that `output` is measured by; None if it has none.

    alone: whether the network has no other output than caches.
    """
    for maker in (_behind(output.name, graph), graph.producer.get(measured)):
        if maker is not None and maker.op_type in _DISTRIBUTIONS:
            axis = int(attribute(maker, "axis", -1))
            return axis if measured in (maker.input[0], maker.output[0]) and axis else None
    if measured != output.name:
        return None
    shape = output.type.tensor_type.shape
    sizes = [d.dim_value for d in shape.dim]
    if len(sizes) < 2 or sizes[-1] == 1:
        return None
    maker = graph.producer.get(output.name)
    embeds = maker is None or maker.op_type in EMBEDS or maker.op_type == "Sigmoid"
    scores = alone and len(sizes) == 2 and not embeds
    named = _NAMED in output.name.lower() and len(sizes) <= 3
    return -1 if scores or named or (len(sizes) == 3 and _is_vocabulary(sizes[-1], output.name, graph)) else None


def divergences(values: Array, reference: Array, axis: int) -> Float:
    """Return KL(p‖p̃) of each row of `values` from `reference`, whose shape `values` has but for leading axes."""
    before, after = _log_softmax(reference, axis), _log_softmax(values, axis)
    with np.errstate(invalid="ignore"):  # a class without any probability counts nothing
        terms = np.exp(before) * (before - after)
    summed: Float = np.where(np.isneginf(before), 0.0, terms).sum(axis=axis)
    return np.maximum(summed, 0.0)


def spreads(logits: Array, axis: int) -> Float:
    """Return ½ zᵀ (diag p - p pᵀ) z of each row z: the divergence, to second order, of a row without any logits."""
    logs = _log_softmax(logits, axis)
    p = np.exp(logs)
    z = np.where(np.isfinite(logs), logs, 0.0)
    mean = (p * z).sum(axis=axis, keepdims=True)
    result: Float = 0.5 * (p * np.square(z - mean)).sum(axis=axis)
    return result


def _log_softmax(logits: Array, axis: int) -> Float:
    z = logits.astype(np.float64)
    z -= z.max(axis=axis, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=axis, keepdims=True))
    return z


def _behind(tensor: str, graph: Graph, passed: frozenset[str] = _MOVED) -> onnx.NodeProto | None:
    """The producer of `tensor`, in front of nodes of the types `passed`."""
    maker = graph.producer.get(tensor)
    while maker is not None and maker.op_type in passed:
        sources = [i for i in maker.input if i not in graph.constants]
        maker = graph.producer.get(sources[0]) if len(sources) == 1 else None
    return maker


def _is_vocabulary(size: int, output: str, graph: Graph) -> bool:
    """Whether a layer makes `output`, and an input looks rows up in a table of `size` rows."""
    maker = _behind(output, graph, _MOVED | _PASSED)
    if maker is None or maker.op_type not in LAYER_TYPES:
        return False
    tables = [n.input for n in graph.nodes if n.op_type == "Gather" and n.input[0] in graph.initializers]
    return any(graph.initializers[table].dims[0] == size and _is_input(index, graph) for table, index in tables)


def _is_input(tensor: str, graph: Graph) -> bool:
    maker = graph.producer.get(tensor)
    while maker is not None and maker.op_type in _MOVED | {"Cast"}:
        tensor = maker.input[0]
        maker = graph.producer.get(tensor)
    return tensor in graph.inputs
