"""What a file tells of itself: its producer, and the names of the weights that it decodes."""

from collections.abc import Iterable

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.protos import all_names, rename
from rdoq_onnx.version import __version__


def name_weights(model: onnx.ModelProto, network: Network) -> None:
    """Give what decodes a weight, in place, the weight's name, where no tensor has it any more.

    InsertQDQ and QuantizeStored name the decoder's output after the weight.
    """
    taken = set(all_names(model.graph))
    gone = [name for name in _weights(network) if name not in taken]
    outputs = {f"{name}_{op}_out": name for name in gone for op in ("DequantizeLinear", "Mul")}
    rename(model.graph.node, {old: new for old, new in outputs.items() if old in taken})


def name_producer(model: onnx.ModelProto) -> None:
    model.producer_name, model.producer_version = "rdoq-onnx", __version__


def _weights(network: Network) -> Iterable[str]:
    yield from dict.fromkeys(layer.weight for layer in network.weights)
