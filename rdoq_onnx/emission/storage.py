"""How the weights of a quantized network are stored: packed, native or int8."""

from collections.abc import Collection
from typing import Literal

import onnx
from onnx import TensorProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.protos import all_names
from rdoq_onnx.passes import Pass, run_passes
from rdoq_onnx.passes.packing.pack_vectors import PackVectors
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.passes.packing.shorten_names import ShortenNames
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.targets import CASTS_INT4, COMPLETE, TARGETS, Storage, TargetName


def check_storage(target: TargetName, storage: Storage | None, runtime: Runtime) -> None:
    """Raise ConfigError if the ONNX Runtime at hand does not read the types that weights shall be stored in."""
    rules = TARGETS[target]
    needed = COMPLETE if rules.int2 else CASTS_INT4
    if (storage or rules.storages[0]) == "native" and runtime.version < needed:
        found, first = (".".join(map(str, v)) for v in (runtime.version, needed))
        raise ConfigError(
            f"--storage native: its types need ONNX Runtime {first}, found {found}; upgrade it, or use --storage int8"
        )


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
    steps: list[Pass] = [PackWeights(weights, storage, network.target.int2), PackVectors(vectors), ShortenNames(known)]
    return run_passes(steps, model)
