"""Rewrites of ONNX models: ModelProto in, ModelProto out, one a module; no disk, no runtime.

A pass is a frozen dataclass whose fields are its options. It may refuse in `requires`, rewrites in
`__call__`, and states in `ensures` what it leaves; `run_passes` calls the three in this order and checks that
the model is valid before and after each pass.

Some modules hold no pass but what passes are made of: for remove_channels stored_layers, constant_channels,
channel_rules and slice_channels, for pack_weights channel_widths, bit_rows and sub_byte_parts, for both that pack
decoding, for all that touch biases correct_bias.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import onnx
from onnx import GraphProto, ModelProto, TensorProto
from onnx.helper import make_tensor_value_info

from rdoq_onnx.errors import ModelError, RdoqError
from rdoq_onnx.protos import copy_fields

__all__ = ["Pass", "check", "model_bytes", "one_line", "run_passes", "tensor_bytes", "weights_as_inputs"]

# The checker serialises the model, which protobuf refuses from 2 GiB on; what is not tensors is small.
_CHECKER_LIMIT = 2**31 - 2**26


class Pass(Protocol):
    """One rewrite, a frozen dataclass. `requires` and `ensures` raise ModelError, or return."""

    def __call__(self, model: ModelProto) -> ModelProto:
        """The rewritten model; `model` is not altered."""
        ...

    def requires(self, model: ModelProto) -> None:
        """Raise ModelError if the pass cannot work on `model`."""
        return

    def ensures(self, model: ModelProto) -> None:
        """Raise ModelError if the rewritten `model` is not what the pass promises."""
        return


def run_passes(passes: Sequence[Pass], model: ModelProto, *, checked: bool = True) -> ModelProto:
    """Apply `passes` in order; `model` is not altered.

    checked: False for a trial that goes to ONNX Runtime at once, which does not take what is not valid either.
    Raises ModelError, naming the pass that failed and those that ran before it. Errors of this package keep their
    class.
    """
    if checked:
        check(model)
    done: list[str] = []
    for step in passes:
        name = type(step).__name__
        try:
            step.requires(model)
            before, model = model, step(model)
            if checked and model is not before:
                check(model)
            step.ensures(model)
        except Exception as error:
            kind = type(error) if isinstance(error, RdoqError) else ModelError
            ran = ", ".join(done) or "none"
            message = f"pass {name} failed: {one_line(error)} (passes that ran before it: {ran})"
            raise kind(message) from error
        done.append(name)
    return model


def check(model: ModelProto) -> None:
    """Raise ModelError unless onnx.checker accepts `model`, which may be larger than the checker can take."""
    try:
        onnx.checker.check_model(model if tensor_bytes(model) < _CHECKER_LIMIT else weights_as_inputs(model))
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the model is not valid ONNX: {one_line(error)}") from error


def tensor_bytes(model: ModelProto) -> int:
    """Bytes of the stored tensors, without serialising anything. Data in other files is not counted."""
    return sum(
        len(t.raw_data)
        + sum(map(len, t.string_data))
        + 4 * (len(t.float_data) + len(t.int32_data))
        + 8 * (len(t.int64_data) + len(t.double_data) + len(t.uint64_data))
        for t in _tensors(model.graph)
    )


def model_bytes(model: ModelProto) -> int:
    """Bytes of `model` in one file, also where protobuf could not write that file."""
    stored = tensor_bytes(model)
    if stored < _CHECKER_LIMIT:
        return int(model.ByteSize())
    return int(weights_as_inputs(model).ByteSize()) + stored


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else []))
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(inner)


def weights_as_inputs(model: ModelProto, larger_than: int = 0) -> ModelProto:
    """`model` with initializers of more than so many elements as mere inputs: small enough to serialise."""
    result = ModelProto()
    copy_fields(model, result, skip={"graph"})
    copy_fields(model.graph, result.graph, skip={"initializer"})
    listed = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= larger_than:
            result.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in listed:
            info = make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            result.graph.input.append(info)
    return result


def one_line(error: Exception) -> str:
    """The message without its line breaks; the checker appends the context of a node on further lines."""
    return " ".join(str(error).split()) or type(error).__name__
