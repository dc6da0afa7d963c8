"""Store the weights of a quantized network: packed, native or int8."""

from collections.abc import Collection
from typing import Literal

import onnx
from onnx import TensorProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.protos import all_names
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing.decoding import PACKED
from rdoq_onnx.passes.packing.pack_vectors import PackVectors
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.passes.packing.shorten_names import ShortenNames
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.targets import CASTS_INT4, COMPLETE, TARGETS, Storage, TargetName


def check_storage(target: TargetName, storage: Storage | None, runtime: Runtime) -> None:
    """Raise ConfigError if the installed ONNX Runtime cannot read the types of this storage."""
    rules = TARGETS[target]
    needed = COMPLETE if rules.int2 else CASTS_INT4
    if (storage or rules.storages[0]) == "native" and runtime.version < needed:
        installed, first = (".".join(map(str, v)) for v in (runtime.version, needed))
        raise ConfigError(
            f"--storage native: needs ONNX Runtime {first}, found {installed}; upgrade it or use --storage int8"
        )


_ABOUT = "Nodes behind packed_* decode weights (to INT8), scales and biases. All constant: folded at load."


def stored(
    model: onnx.ModelProto, storage: Literal["packed", "native"], network: Network, wide: Collection[str]
) -> onnx.ModelProto:
    """Store what quantization added to `network` in fewer bytes and under shorter names.

    wide: initializers that stay INT8: packing an embedding table for its few rows of zeros would cost more at load than
    it saves.
    """
    original = set(all_names(network.model.graph))
    added = [t for t in model.graph.initializer if t.name not in original]
    integers = [t.name for t in added if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    weights = [name for name in integers if name not in wide]
    # Behind a Cast that nothing folds, ONNX Runtime 1.32 takes the scales of a MatMulNBits for 0.
    kept = {name for node in model.graph.node if node.op_type == "MatMulNBits" for name in node.input}
    vectors = [t.name for t in added if t.name not in integers and t.name not in kept]
    packed = run_passes([PackWeights(weights, storage, network.target.int2), PackVectors(vectors)], model)
    readable = {t.name for t in packed.graph.initializer if t.name.startswith(PACKED)}
    packed = run_passes([ShortenNames(original | readable)], packed)
    if readable:
        packed.graph.doc_string = "\n".join(filter(None, (packed.graph.doc_string, _ABOUT)))
    return packed
