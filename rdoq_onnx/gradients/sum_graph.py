"""Graph nodes for the sums over samples of curves/taylor.py, candidates/sensitivity.py and candidates/moments.py.

The sums are computed inside the graph, so that a GPU transfers neither activations nor adjoints to the host. A graph is
built for one batch size and returns the sums of one batch in float32; the caller accumulates batches in double.

    curve         Σ_n ⟨g (X - E[x])ᵀ, ΔW⟩²    for each channel and ΔW
    rounding      Σ_n ⟨g, Q(a) - a⟩²          for each quantizer, Q(a) = s·clip(round(a / s))
    sensitivity   Σ_n Σ_j ∇_j ∇_jᵀ
    moments       Σ x and Σ x xᵀ

A sample with a seed of zeros has g = 0 and contributes nothing to the first three.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from rdoq_onnx.gradients.im2col_nodes import gradient, transpose, unfold
from rdoq_onnx.gradients.tape import Tape
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.model.layers import Layer

_ROUNDED = 1 << 26  # values times quantizers rounded at once

Array = NDArray[Any]


class SumGraph:
    """Sums appended to `model` for a batch of `samples` samples; they are its outputs, in the order of the calls.

    shapes: of the summed tensors, all of them float32.
    """

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], samples: int) -> None:
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        taken.update(v.name for v in (*model.graph.input, *model.graph.initializer))
        self.shapes, self._model, self._samples = shapes, model, samples
        self._tape = Tape(shapes, dict.fromkeys(shapes, TensorProto.FLOAT), {}, opset, _no_run, taken)
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[str] = []

    def curve(self, layer: Layer, adjoints: Mapping[str, str], mean: Array, changes: int) -> str:
        """Append [units, 1, changes]. Returns the input for ΔW, [units, weights of a unit, changes]."""
        tape, linear = self._tape, layer.linear
        blocks = gradient(tape, layer, adjoints, mean, self._samples)
        groups, inputs = mean.shape
        length = linear.row_length
        if linear.op_type == "ConvTranspose":
            rows = tape.reshape(transpose(tape, blocks, 2, 0, 1, 3), [linear.channels, self._samples, groups * inputs])
        else:
            rows = transpose(tape, tape.reshape(blocks, [self._samples, linear.channels, inputs]), 1, 0, 2)
        name = tape.name(f"change/{layer.weight}")
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [linear.channels, length, changes]))
        self._squares(tape.op("MatMul", rows, name), axis=1)
        return name

    def rounding(self, tensor: str, adjoint: str, quantizers: Sequence[Affine]) -> None:
        """Append [1, quantizers, 1]."""
        tape = self._tape
        size = int(np.prod(tape.shapes[tensor]))
        values = tape.reshape(tensor, [self._samples, 1, -1])
        g = tape.reshape(adjoint, [self._samples, -1, 1])
        step = max(_ROUNDED // size, 1)
        parts = [self._errors(tensor, values, g, quantizers[k : k + step]) for k in range(0, len(quantizers), step)]
        self._squares(parts[0] if len(parts) == 1 else tape.op("Concat", *parts, axis=1), axis=0)

    def sensitivity(self, layer: Layer, adjoints: Mapping[str, str], mean: Array, blocks: tuple[int, int]) -> None:
        """Append [G·parts, B, B]; blocks: (G·parts, B)."""
        gradients = gradient(self._tape, layer, adjoints, mean, self._samples)
        vectors = self._tape.reshape(transpose(self._tape, gradients, 1, 3, 0, 2), [*mean.shape, -1])
        self._outputs.append(self._second(vectors, mean.shape, blocks))

    def moments(self, layer: Layer, inputs: tuple[int, int], blocks: tuple[int, int]) -> None:
        """Append the shape [G, K, vectors], the sum of vectors [G, K, 1], and [G·parts, B, B]; blocks: (G·parts, B)."""
        tape = self._tape
        uses = [tape.reshape(unfold(tape, u.linear, u.data, 1), [*inputs, -1]) for u in layer.uses]
        self._moments(uses[0] if len(uses) == 1 else tape.op("Concat", *uses, axis=2), inputs, blocks)

    def positions(self, tensor: str, blocks: tuple[int, int]) -> None:
        """Append the outputs of `moments` for the vectors along axis 1 of `tensor`."""
        tape = self._tape
        inputs = (1, tape.shapes[tensor][1])
        rest = [k for k in range(len(tape.shapes[tensor])) if k != 1]
        self._moments(tape.reshape(transpose(tape, tensor, 1, *rest), [*inputs, -1]), inputs, blocks)

    def model(self) -> onnx.ModelProto:
        """Return a copy of the model with the sums as its outputs."""
        copy, tape = onnx.ModelProto(), self._tape
        copy.CopyFrom(self._model)
        graph = copy.graph
        graph.node.extend(tape.nodes)
        graph.initializer.extend(tape.initializers.values())
        graph.input.extend(self._inputs)
        del graph.output[:]
        graph.output.extend(ValueInfoProto(name=name) for name in self._outputs)
        return copy

    def _errors(self, tensor: str, values: str, g: str, quantizers: Sequence[Affine]) -> str:
        """Append ⟨g, Q(a) - a⟩ [samples, quantizers, 1] of values [samples, 1, E] and g [samples, E, 1]."""

        def constant(numbers: Sequence[float]) -> str:
            return tape.constant(np.reshape(numbers, (1, -1, 1)), tensor)

        tape = self._tape
        scale = constant([q.scale for q in quantizers])
        steps = tape.op("Div", values, scale)
        above = tape.op("Max", tape.op("Round", steps), constant([q.low - q.zero_point for q in quantizers]))
        integers = tape.op("Min", above, constant([q.high - q.zero_point for q in quantizers]))
        return tape.op("Mul", tape.op("MatMul", tape.op("Sub", integers, steps), g), scale)

    def _squares(self, products: str, axis: int) -> None:
        self._outputs.append(self._tape.sum(self._tape.op("Mul", products, products), [axis]))

    def _moments(self, vectors: str, inputs: tuple[int, int], blocks: tuple[int, int]) -> None:
        tape = self._tape
        self._outputs += [tape.op("Shape", vectors), tape.sum(vectors, [2]), self._second(vectors, inputs, blocks)]

    def _second(self, vectors: str, inputs: Sequence[int], blocks: tuple[int, int]) -> str:
        """Append Σ v vᵀ over the vectors [G, K, ...], in parts (see `candidates.blocks.in_parts`)."""
        tape, (count, width) = self._tape, blocks
        missing = count // inputs[0] * width - inputs[1]
        parts = tape.reshape(tape.pad(vectors, [0, 0, 0], [0, missing, 0]), [count, width, -1])
        return tape.op("MatMul", parts, transpose(tape, parts, 0, 2, 1))


def _no_run(node: NodeProto, feeds: Mapping[str, Array]) -> Array:
    raise NotImplementedError(f"{node.op_type} is not run while sums are appended")
