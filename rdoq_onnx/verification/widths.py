"""Check that the integers of the emitted file fit the allocated widths."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.model.graph import upstream
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.passes.packing.store_nbits import stored_integers
from rdoq_onnx.system.runtime import Runtime

_Pair = tuple[Layer, NDArray[np.int64]]
_TOGETHER = 1 << 27  # integers that are decoded together


def check_widths(emission: Emission, allocation: Allocation, runtime: Runtime) -> None:
    """Raise VerificationError unless each channel's integers in the file fit its allocated width."""
    if not allocation.layer_bits:
        return
    nodes = {n.name: n for n in emission.model.graph.node}
    producer = {o: n for n in emission.model.graph.node for o in n.output}
    # Rows that a body looks up are decoded in it, where names may repeat those of another.
    pairs = [
        (layer, bits)
        for layer, bits in zip(allocation.measurement.network.searched, allocation.layer_bits, strict=True)
        if layer.name in nodes or layer.weight in producer
    ]
    for layer, bits in [(layer, bits) for layer, bits in pairs if layer.name in nodes]:
        integers = stored_integers(nodes[layer.name], emission.model.graph)
        if integers is not None:
            kept = np.delete(np.arange(len(bits)), list(emission.removed.get(layer.name, ())))
            _check(layer, integers, kept, bits[kept])
            pairs = [pair for pair in pairs if pair[0] is not layer]
    for group in _groups(pairs) if pairs else ():
        sources = [_integers(layer, nodes, producer) for layer, _ in group]
        for (layer, bits), integers in zip(group, constants(emission.model, sources, runtime), strict=True):
            kept = np.delete(np.arange(len(bits)), list(emission.removed.get(layer.name, ())))
            _check(layer, integers, kept, bits[kept])


def _integers(layer: Layer, nodes: Mapping[str, NodeProto], producer: Mapping[str, NodeProto]) -> str:
    """Return the tensor of a layer's integers, which its DequantizeLinear reads, or a Cast in front of its Mul."""
    if not layer.linear.axes:
        decoder = producer[nodes[layer.name].input[layer.linear.weight_side]]
    else:  # a node that looks up rows has become their Mul
        decoder = producer.get(layer.weight) or nodes[layer.name]
    if decoder.op_type == "DequantizeLinear":
        return str(decoder.input[0])
    cast = producer[decoder.input[0]]
    reader = producer[cast.input[0]] if layer.linear.axes else cast  # a Gather, or a Cast to INT32
    return str(reader.input[0])


def _groups(pairs: Sequence[_Pair]) -> Iterator[list[_Pair]]:
    """Divide the layers so that the integers of a group fit in memory. Few groups: each decodes what layers share."""
    group: list[_Pair] = []
    total = 0
    for pair in pairs:
        size = math.prod(pair[0].linear.shape)
        if group and total + size > _TOGETHER:
            yield group
            group, total = [], 0
        group.append(pair)
        total += size
    yield group


def _check(layer: Layer, integers: NDArray[Any], kept: NDArray[np.int64], bits: NDArray[np.int64]) -> None:
    """Raise VerificationError unless the integers of each channel `kept` fit its `bits`."""
    linear = layer.linear
    rest = tuple(k for k in range(integers.ndim) if k not in (linear.axes or (linear.axis,)))
    spans = (integers.max(axis=rest).astype(np.int64) - integers.min(axis=rest)).reshape(-1)
    wide = np.flatnonzero(spans >= np.left_shift(1, bits))
    if len(wide):
        unit = int(wide[0])
        contents = f"{spans[unit] + 1} levels in the file, {bits[unit]} bits allocated"
        raise VerificationError(f"layer {layer.name!r}, channel {kept[unit]}: {contents}")


def constants(model: onnx.ModelProto, names: Sequence[str], runtime: Runtime) -> list[NDArray[Any]]:
    """Return tensors of `model` that depend on no input, as ONNX Runtime decodes them."""
    needed = upstream(names, {o: n for n in model.graph.node for o in n.output})
    reads = {*names, *(i for n in needed for i in n.input)}
    stored = [t for t in model.graph.initializer if t.name in reads]
    outputs = [onnx.ValueInfoProto(name=n) for n in names]
    graph = helper.make_graph(needed, "constants", [], outputs, stored)
    part = helper.make_model(graph, ir_version=model.ir_version, opset_imports=model.opset_import)
    return runtime.session(part, "none").run({}, names)
