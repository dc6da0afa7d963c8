"""An allocation in, the quantized model out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.weight_only import BITS
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.emission.naming import name_producer, name_weights
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.emission.storage import stored
from rdoq_onnx.emission.weight_only import with_weight_only
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.pruning.remove_channels import RemoveChannels, removable
from rdoq_onnx.targets import Storage
from rdoq_onnx.version import __version__

METADATA = "rdoq_onnx"
# ONNX Runtime runs a convolution of 30 channels slower than one of 32, and of 24 nearly as fast as its share says.
_MULTIPLE = 8


@dataclass(frozen=True)
class Emission:
    """A file, and what its making decided.

    removed: for each layer's node, the output channels that were folded away. kept: for each layer's node, channels of
    0 bits that stay, each with the reason.
    """

    model: onnx.ModelProto
    storage: Storage
    removed: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[tuple[int, str], ...]]


def emit_model(
    allocation: Allocation,
    settings: Mapping[str, object],
    storage: Storage | None = None,
    keep_channels: bool = False,
    plain: onnx.ModelProto | None = None,
) -> Emission:
    """The file of `allocation`: channels of 0 bits folded away, weights stored as `storage` says.

    settings: what metadata_props shall tell of how the file was made. storage: None for the target's default.
    plain: the `quantized_model` of `allocation`, where it is at hand; it may be altered.
    """
    network = allocation.measurement.network
    plain = quantized_model(allocation) if plain is None else plain
    storage = storage or network.target.storages[0]
    removal = None if keep_channels else removable(plain, _MULTIPLE)
    model = run_passes([RemoveChannels(removal)] if removal is not None and removal.outputs else [], plain)
    unsearched = list(zip(network.weight_only, allocation.weight_only_bits, strict=True))
    model = with_weight_only(model, [(w, bits) for w, bits in unsearched if bits < BITS])
    narrow = {t.name for t in model.graph.initializer}
    model = with_weight_only(model, [(w, bits) for w, bits in unsearched if bits == BITS])
    name_weights(model, network)
    if storage != "int8":
        model = stored(model, storage, network, narrow)
    name_producer(model)
    for key, value in (("version", __version__), ("settings", settings)):
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True)
        model.metadata_props.add(key=f"{METADATA}.{key}", value=text)
    return Emission(model, storage, removal.outputs if removal else {}, removal.kept if removal else {})


def settings(config: Config, samples: Samples) -> dict[str, Any]:
    """What a reader of the file needs to make it again."""
    # By content: the same samples from another path, or from memory, make the same file.
    source = samples.source if samples.source == "synthetic" else f"sha256:{samples.digest}"
    return asdict(replace(config, provider="auto")) | {"calibration": source, "samples": len(samples)}
