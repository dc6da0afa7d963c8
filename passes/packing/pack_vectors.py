"""Scales and biases in half precision, decoded exactly by standard operators when a model is loaded.

    scales        FLOAT16 of all weights ─ Cast ─ Split ─ one for each weight [─ Reshape]
    biases        FLOAT16 of all layers ─ Cast ─ Div by their steps ─ Round ─ Cast ─ Split ─ INT32 ─ DequantizeLinear
    zero points   one zero ─ Expand to the length; those of biases ─ Cast from those of weights

A bias's step is what its integers count: weight scale x activation scale. All layers share the operators, as one that
serves a layer of few channels would be larger than what it saves. No value changes: what half precision does not give
back bit for bit stays as it is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.surgeon import Constant, Graph, Tensor
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.packing.decoding import Decoding

# An Expand and its shape take about as many bytes of the file.
_WORTH_AN_EXPAND = 64


@dataclass(frozen=True)
class PackVectors(Pass):
    """Store the float32 vectors, INT32 biases and INT8 zeros among the initializers `added` in fewer bytes.

    `added` is what a quantizer put into the model; nothing else is touched. Of those that are equal one is left. Run it
    after PackWeights, which reads the shapes of the scales.
    """

    added: Collection[str]

    def __call__(self, model: ModelProto) -> ModelProto:
        def pack(graph: Graph) -> None:
            tensors = surgeon.all_tensors(graph)
            stored = [t for n in sorted(self.added) if isinstance(t := tensors.get(n), Constant)]
            decoding = Decoding(graph)
            # Biases first, while the scales that their steps are made of are still there to be read.
            order = _halve_biases(decoding, [t for t in stored if t.dtype == np.int32 and _decoded(t)])
            left = _merged(decoding, [t for t in stored if not (t.dtype == np.int32 and _decoded(t))])
            vectors = [t for t in left if t.dtype == np.float32 and t.values.size > 1]
            # In the order of the biases, the two are split alike, by one constant.
            _halve_vectors(decoding, sorted(vectors, key=lambda t: order.get(id(t), len(order))))
            _make_zeros(decoding, [t for t in left if t.dtype in (np.int8, np.int32) and t.values.ndim == 1])

        return surgeon.edit(model, pack)


def _decoded(integers: Constant) -> bool:
    """Whether they are what a DequantizeLinear decodes; else they are its zero point."""
    return any(n.op == "DequantizeLinear" and n.inputs[0] is integers for n in integers.outputs)


def _halve_biases(decoding: Decoding, biases: Sequence[Constant]) -> dict[int, int]:
    """Where the scales that their steps are made of stand in the order of the biases, by `id`."""
    found: list[tuple[Constant, Tensor, NDArray[np.float16]]] = []
    for bias in biases:
        scales = {id(n.inputs[1]): n.inputs[1] for n in bias.outputs if n.op == "DequantizeLinear"}
        step = next(iter(scales.values())) if len(scales) == 1 else None
        size = _step_size(step) if step is not None else None
        if size is None or size.shape != bias.values.shape or size.ndim != 1:
            continue
        half = _half(bias.values * size.astype(np.float64))
        with np.errstate(all="ignore"):  # what overflows, or is no number, is not equal and stays
            exact = np.array_equal(np.rint(half.astype(np.float32) / size), bias.values)
        if exact:
            found.append((bias, step, half))
    if not found:
        return {}
    steps = [step for _, step, _ in found]
    joined = decoding.op("Concat", *steps, axis=0) if len(steps) > 1 else steps[0]
    ratio = decoding.op("Div", _stored(decoding, "biases", [h for _, _, h in found]), joined)
    integers = decoding.op("Cast", decoding.op("Round", ratio), to=TensorProto.INT32)
    _replace(decoding, [bias for bias, _, _ in found], integers)
    factors = [t for step in steps for node in step.inputs for t in node.inputs]
    return {id(t): k for k, t in enumerate(factors)}


def _step_size(step: Tensor) -> NDArray[np.float32] | None:
    """The value of a step that is a constant, or the product of two."""
    if not step.inputs:
        return surgeon.values(step)
    factors = [f for t in step.inputs[0].inputs if (f := surgeon.values(t)) is not None]
    if step.inputs[0].op != "Mul" or len(factors) < 2:
        return None
    product: NDArray[np.float32] = factors[0] * factors[1]
    return product


def _merged(decoding: Decoding, tensors: Sequence[Constant]) -> list[Constant]:
    """One of all that are equal; what read the others reads it."""
    first: dict[tuple[Any, ...], Constant] = {}
    for tensor in tensors:
        value = tensor.values
        one = first.setdefault((value.dtype.str, value.shape, value.tobytes()), tensor)
        if one is not tensor:
            decoding.replace(tensor, one)
    return list(first.values())


def _halve_vectors(decoding: Decoding, vectors: Sequence[Constant]) -> None:
    exact = [v for v in vectors if np.array_equal(_half(v.values).astype(np.float32), v.values)]
    if exact:
        _replace(decoding, exact, _stored(decoding, "scales", [_half(v.values).reshape(-1) for v in exact]))


def _half(values: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _stored(decoding: Decoding, what: str, halves: Sequence[NDArray[np.float16]]) -> Tensor:
    return decoding.op("Cast", decoding.packed(what, np.concatenate(halves)), to=TensorProto.FLOAT)


def _replace(decoding: Decoding, vectors: Sequence[Constant], joined: Tensor) -> None:
    """Have all that read `vectors` read their part of `joined`, in their shape."""
    parts = decoding.split(joined, [v.values.size for v in vectors])
    for vector, part in zip(vectors, parts, strict=True):
        shape = vector.values.shape
        decoding.replace(vector, part if len(shape) == 1 else decoding.reshape(part, shape))


def _make_zeros(decoding: Decoding, vectors: Sequence[Constant]) -> None:
    zeros = sorted((v for v in vectors if not v.values.any()), key=lambda v: v.values.itemsize)
    made: dict[int, Tensor] = {}
    for vector in zeros:
        size = vector.values.size
        if vector.dtype == np.int32 and size in made:
            decoding.replace(vector, decoding.op("Cast", made[size], to=TensorProto.INT32))
            continue
        made[size] = vector
        if vector.values.nbytes > _WORTH_AN_EXPAND:
            zero = np.zeros((), vector.dtype)
            made[size] = decoding.op("Expand", zero, np.array(vector.values.shape, np.int64))
            decoding.replace(vector, made[size])
