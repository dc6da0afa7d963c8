"""Local functions replaced by what they are made of: layers within them can then be quantized."""

from dataclasses import dataclass

from onnx import ModelProto, inliner

from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.normalize import sparing_weights


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """No calls of functions that the model defines. Leaves models without such functions as they are."""

    def __call__(self, model: ModelProto) -> ModelProto:
        return sparing_weights(model, inliner.inline_local_functions) if model.functions else model
