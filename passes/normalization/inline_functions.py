"""Inline model-local functions, so that the layers within them can be quantized."""

from dataclasses import dataclass

from onnx import ModelProto, inliner

from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.normalize import without_weights


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Inline all calls of model-local functions. Leaves models without such functions unchanged."""

    def __call__(self, model: ModelProto) -> ModelProto:
        return without_weights(model, inliner.inline_local_functions) if model.functions else model
