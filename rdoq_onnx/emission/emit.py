"""Write an allocation as the quantized model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.emission.naming import name_producer, name_weights
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.emission.storage import stored
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.opaque_shapes import OpaqueShapes
from rdoq_onnx.passes.packing.store_nbits import StoreNBits
from rdoq_onnx.passes.pruning.remove_channels import RemoveChannels, removable
from rdoq_onnx.passes.share_ties import ShareTies
from rdoq_onnx.targets import Storage
from rdoq_onnx.version import __version__

METADATA = "rdoq_onnx"
# ONNX Runtime runs a convolution of 30 channels slower than one of 32, while 24 save nearly their share of the time.
# Its integer kernel for depthwise layers takes channels beyond a multiple of 16 one at a time: 72 take twice as long.
MULTIPLE, DEPTHWISE = 8, 16
_WORTH_PACKING = 7.5  # average bits up to which a table's decode at load pays
_OF_COSTS = ("cost", "budget", "layer_limit_activations")  # recorded where they are given
_OF_THE_MACHINE = ("scratch", "memory", "workers")  # settings that no byte depends on


@dataclass(frozen=True)
class Emission:
    """The emitted model, and the decisions made while emitting it.

    removed: by layer node, the output channels folded away. kept: by layer node, the 0-bit channels that stay, each
    with the reason.
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
    """Emit the model of `allocation`: fold 0-bit channels away, store weights as `storage` says.

    settings: recorded in metadata_props. storage: None for the target's default. plain: the `quantized_model` of
    `allocation` if already made; it may be modified.
    """
    network = allocation.measurement.network
    plain = quantized_model(allocation) if plain is None else plain
    storage = storage or network.target.storages[0]
    removal = None if keep_channels else removable(plain, MULTIPLE, DEPTHWISE)
    weights = {layer.name: layer.weight for layer in network.layers}
    pruning = [RemoveChannels(removal)] if removal is not None and removal.outputs else []
    model = run_passes([*pruning, OpaqueShapes()], plain)
    if storage == "nbits":
        model = run_passes([StoreNBits()], model)
    model = run_passes([ShareTies([(tie.table.weight, weights[tie.layer]) for tie in network.ties])], model)
    name_weights(model, network)
    if storage != "int8":
        model = stored(model, "native" if storage == "native" else "packed", network, _wide(allocation))
    name_producer(model)
    for key, value in (("version", __version__), ("settings", settings)):
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), sort_keys=True)
        model.metadata_props.add(key=f"{METADATA}.{key}", value=text)
    return Emission(model, storage, removal.outputs if removal else {}, removal.kept if removal else {})


def _wide(allocation: Allocation) -> set[str]:
    """Return the integers of stored weights that are not worth packing: few of their rows have fewer than 8 bits."""
    searched = zip(allocation.measurement.network.searched, allocation.layer_bits, strict=True)
    wide = [layer for layer, bits in searched if layer.linear.axes and bits.mean() > _WORTH_PACKING]
    return {f"{layer.weight}_quantized" for layer in wide}


def recorded_settings(config: Config, samples: Samples) -> dict[str, Any]:
    """Return the settings that reproduce the file, for its metadata."""
    # Identified by content: the same samples from another path, or from memory, give the same file.
    source = samples.source if samples.source == "synthetic" else f"sha256:{samples.digest}"
    settings = asdict(replace(config, provider="auto")) | {"calibration": source, "samples": len(samples)}
    settings["cost"] = config.cost.identity if config.cost is not None and config.spends_cost else None
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE}
    return {name: value for name, value in kept.items() if name not in _OF_COSTS or value}
