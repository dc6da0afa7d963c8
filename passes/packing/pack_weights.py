"""INT8 weights stored in as many bits as their channels need, decoded by standard operators when a model is loaded.

The decode ends in the same INT8 tensor, so that everything behind it, DequantizeLinear first, stays as it was.

- "packed" (bit_rows.py): exactly b bits an element for a channel of width b, 0 to 8.
- "native" (sub_byte_parts.py): initializers of 2, 4 and 8 bits, for runtimes that fold less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from onnx import ModelProto, TensorProto

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import surgeon
from rdoq_onnx.model.protos import default_opset
from rdoq_onnx.passes import Pass
from rdoq_onnx.passes.normalization.normalize import raise_ir_version, raise_opset
from rdoq_onnx.passes.packing.bit_rows import store_rows
from rdoq_onnx.passes.packing.channel_widths import MAX_BITS, read_weights
from rdoq_onnx.passes.packing.sub_byte_parts import containers, is_smaller, opset_of, store_parts

# ONNX Runtime does not fold what gives more than 1 GiB.
_FOLDABLE = 2**29


@dataclass(frozen=True)
class PackWeights(Pass):
    """Store each of the INT8 initializers `weights` in fewer bits; those for which that makes no smaller file stay.

    A weight's channel axis is that of the DequantizeLinear that reads it, or the first of the scales that multiply its
    Cast. Any other axis is decoded as well, but costs bits.

    storage: "packed" or "native", see above. "native" raises the opset to 21 for INT4 and to 25 for INT2.
    int2: whether "native" may use INT2.
    """

    weights: Sequence[str]
    storage: Literal["packed", "native"] = "packed"
    int2: bool = True

    def requires(self, model: ModelProto) -> None:
        kinds = {t.name: t.data_type for t in model.graph.initializer}
        for name in self.weights:
            if kinds.get(name) != TensorProto.INT8:
                raise ModelError(f"{name!r} is not an INT8 initializer")

    def __call__(self, model: ModelProto) -> ModelProto:
        weights = read_weights(model, self.weights)
        if self.storage == "packed":
            packed = [w for w in weights if w.integers.size < _FOLDABLE and w.bits.min() < MAX_BITS]
            return surgeon.edit(model, partial(store_rows, weights=packed))
        parts = {w: containers(w, (2, 4, 8) if self.int2 else (4, 8)) for w in weights}
        parts = {w: sizes for w, sizes in parts.items() if is_smaller(w, sizes)}
        opset = opset_of(parts.values())
        if default_opset(model) < opset:
            model = raise_opset(model, opset)
            raise_ir_version(model)
        return surgeon.edit(model, partial(store_parts, parts=parts))
