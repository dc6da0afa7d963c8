"""The passes that normalize any model to the form that the analysis reads."""

from pathlib import Path

import onnx

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.external import Shelf, taking
from rdoq_onnx.model.protos import default_opset
from rdoq_onnx.model.validate import check_model
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization.fold_batchnorm import FoldBatchNorm
from rdoq_onnx.passes.normalization.fold_constants import FoldConstants
from rdoq_onnx.passes.normalization.fold_scalars import FoldScalars
from rdoq_onnx.passes.normalization.fuse_hard_swish import FuseHardSwish
from rdoq_onnx.passes.normalization.hoist_weights import HoistWeights
from rdoq_onnx.passes.normalization.inline_functions import InlineFunctions
from rdoq_onnx.passes.normalization.normalize import Normalize, raise_opset
from rdoq_onnx.passes.normalization.widen_floats import WidenFloats
from rdoq_onnx.passes.unfusing.unfuse import Unfuse
from rdoq_onnx.system import io

OPSET = 13
_RUNNABLE = (InlineFunctions(), WidenFloats())
_TIDY = (Normalize(OPSET), HoistWeights(), FoldConstants(), FuseHardSwish(), FoldBatchNorm(), FoldScalars())
NORMALIZE = (*_RUNNABLE, Unfuse(), *_TIDY)
_FIRST_OPSET = 7  # the oldest that ONNX Runtime accepts
Model = onnx.ModelProto | str | Path


def read_normalized(
    model: Model, shelf: Shelf | None = None, products: bool = True
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the original model and the model after the NORMALIZE passes. Raises ModelError.

    products: whether attention is written out, so that activations inside can be quantized; else it stays one operator.
    shelf: where large weights go; None keeps those in memory that are not in files of the user's.
    """
    if not isinstance(model, onnx.ModelProto | str | Path):
        raise ModelError(f"the model is a {type(model).__name__}; give a path or an onnx.ModelProto")
    original = model if isinstance(model, onnx.ModelProto) else io.read_model(model)
    if shelf is not None:
        original = shelf.detached(original)
    check_model(original)
    with taking(shelf):
        return original, run_passes((*_RUNNABLE, Unfuse(products), *_TIDY), original)


def runnable(original: onnx.ModelProto, shelf: Shelf | None = None) -> onnx.ModelProto:
    """The float model in a form that ONNX Runtime runs: float16 widened to float32, and opset 7 or later."""
    with taking(shelf):
        model = run_passes(_RUNNABLE, original)
    return raise_opset(model, OPSET) if 0 < default_opset(model) < _FIRST_OPSET else model
