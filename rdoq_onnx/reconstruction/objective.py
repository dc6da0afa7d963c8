"""The loss of a batch, as nodes behind a network: the distortion of its outputs, and of tensors inside it.

    L = δ / δ_0 + w / T · Σ_t ‖â_t - a_t‖² / E‖a_t‖²

δ is the run's metric (observation/distortion.py) and δ_0 its value for outputs of 0. The second sum is over T tensors
inside, before they are quantized: few samples leave much undetermined that these settle (BRECQ, Li et al., ICLR 2021).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.distortion import Metric

LOSS = "reconstruction loss"


@dataclass(frozen=True)
class Objective:
    """The loss: `metric` of the outputs, and w = `weight` of tensors `inside`, each with its E‖a_t‖² per element."""

    metric: Metric
    inside: Mapping[str, float]
    weight: float

    @property
    def tensors(self) -> list[str]:
        """The tensors that are compared with those of the float network."""
        counted = [n for n, w in zip(self.metric.outputs, self.metric.factors, strict=True) if w]
        return list(dict.fromkeys([*counted, *self.inside]))

    def appended(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], samples: int) -> onnx.ModelProto:
        """Return `model` with the mean loss of a batch of `samples` as its only output.

        shapes: of the `tensors`, whose float values are additional inputs, named by `target`.
        """
        result = with_outputs(model, [LOSS])
        result.graph.output[0].CopyFrom(helper.make_tensor_value_info(LOSS, TensorProto.FLOAT, [1]))
        for name in self.tensors:
            result.graph.input.append(helper.make_tensor_value_info(target(name), TensorProto.FLOAT, shapes[name]))
        nodes = _Nodes(result.graph)
        terms = _distortions(nodes, self.metric, shapes, samples)
        for name, power in self.inside.items():
            share = self.weight / (len(self.inside) * prod(shapes[name]) * (power or 1.0))
            terms.append(nodes.scaled(nodes.squares(name), share))
        result.graph.node.append(helper.make_node("Sum", terms, [LOSS], LOSS))
        return result


def _distortions(nodes: "_Nodes", metric: Metric, shapes: Mapping[str, Sequence[int]], samples: int) -> list[str]:
    """Append what each output adds to δ / δ_0, a mean over `samples`."""
    each, terms = metric.elements * metric.signal * samples, []
    for k, (name, w, axis) in enumerate(zip(metric.outputs, metric.factors, metric.axes, strict=True)):
        if w:
            error = nodes.squares(name) if axis is None else nodes.divergence(name, axis)
            share = metric.share(k, prod(shapes[name]) // samples)
            terms.append(nodes.scaled(error, w**2 * share / each))
    return terms


def target(tensor: str) -> str:
    """Return the name of the input for the float values of `tensor`."""
    return f"{tensor}/float"


class _Nodes:
    """Appends nodes to a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph

    def squares(self, tensor: str) -> str:
        """Append ‖â - a‖²."""
        error = self._add("Sub", tensor, target(tensor))
        return self._total(self._add("Mul", error, error))

    def divergence(self, tensor: str, axis: int) -> str:
        """Append Σ p (log p - log p̃) of rows of logits, KL(p‖p̃)."""
        logs = [self._add("LogSoftmax", name, axis=axis) for name in (target(tensor), tensor)]
        return self._total(self._add("Mul", self._add("Exp", logs[0]), self._add("Sub", *logs)))

    def scaled(self, value: str, factor: float) -> str:
        return self._add("Mul", value, self._constant(np.array([factor], np.float32)))

    def _total(self, value: str) -> str:
        flat = self._add("Reshape", value, self._constant(np.array([-1])))
        return self._add("ReduceSum", flat, self._constant(np.array([0])), keepdims=1)

    def _add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{LOSS}/{op_type} {len(self._graph.node)}"
        self._graph.node.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def _constant(self, value: NDArray[Any]) -> str:
        name = f"{LOSS}/constant {len(self._graph.initializer)}"
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
