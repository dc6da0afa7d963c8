"""Rewrites of ONNX models: ModelProto in, ModelProto out, one per module; no disk, no runtime.

A pass is a frozen dataclass whose fields are its options. It may refuse in `requires`, rewrites in `__call__`, and
verifies its promise in `ensures`; `run_passes` calls the three in this order and checks that the model is valid before
and after each pass.

Some modules contain building blocks instead of a pass: linear_layer for fold_batchnorm and fold_scalars; stored_layers,
constant_channels, channel_rules and slice_channels for remove_channels; channel_widths, bit_rows and sub_byte_parts for
pack_weights; decoding for both packing passes; correct_bias for all passes that change biases; zeros for zero points.
"""

from collections.abc import Sequence
from typing import Protocol

import onnx
from onnx import ModelProto

from rdoq_onnx.errors import ModelError, RdoqError
from rdoq_onnx.model.external import without_detached
from rdoq_onnx.model.sizes import serializable, weights_as_inputs
from rdoq_onnx.model.validate import set_apart

__all__ = ["Pass", "check", "one_line", "run_passes"]


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

    checked: False skips the checker, for trials that go straight to ONNX Runtime, which rejects invalid models itself.
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
    """Raise ModelError unless onnx.checker accepts `model`; works beyond the checker's 2 GiB limit.

    Operators that ONNX Runtime adds to the standard's domain pass as those of a domain of their own.
    """
    bare = set_apart(without_detached(model)[0])
    try:
        onnx.checker.check_model(bare if serializable(bare) else weights_as_inputs(bare))
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the model is not valid ONNX: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The message on one line; the checker puts the context of a node on further lines."""
    return " ".join(str(error).split()) or type(error).__name__
