"""How the weights of a quantized network are stored: packed, native or int8."""

from collections.abc import Collection
from typing import Literal

import onnx
from onnx import TensorProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.protos import all_names
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing.decoding import PACKED
from rdoq_onnx.passes.packing.pack_vectors import PackVectors
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.passes.packing.shorten_names import ShortenNames

_ABOUT = "Nodes behind packed_* decode weights (to INT8), scales and biases. All constant: folded at load."


def stored(
    model: onnx.ModelProto, storage: Literal["packed", "native"], network: Network, narrow: Collection[str]
) -> onnx.ModelProto:
    """`model` with what quantization added to `network` stored in fewer bytes, and under shorter names.

    narrow: initializers whose integers may need fewer than 8 bits. Packing a table for its few rows of zeros would cost
    more when it is loaded than it saves.
    """
    known = set(all_names(network.model.graph))
    added = [t for t in model.graph.initializer if t.name not in known]
    integers = [t.name for t in added if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    weights = [name for name in integers if name in narrow]
    vectors = [t.name for t in added if t.name not in integers]
    packed = run_passes([PackWeights(weights, storage, network.target.int2), PackVectors(vectors)], model)
    readable = {t.name for t in packed.graph.initializer if t.name.startswith(PACKED)}
    packed = run_passes([ShortenNames(known | readable)], packed)
    if readable:
        packed.graph.doc_string = "\n".join(filter(None, (packed.graph.doc_string, _ABOUT)))
    return packed
