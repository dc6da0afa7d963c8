"""Check that the integers of the emitted file fit the allocated widths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.model.graph import upstream
from rdoq_onnx.system.runtime import Runtime


def check_widths(emission: Emission, allocation: Allocation, runtime: Runtime) -> None:
    """Raise VerificationError unless each channel's integers in the file fit its allocated width."""
    if not allocation.layer_bits:
        return
    nodes = {n.name: n for n in emission.model.graph.node}
    producer = {o: n for n in emission.model.graph.node for o in n.output}
    layers = allocation.measurement.network.layers
    sources = {}
    for layer in layers:
        decoder = producer[nodes[layer.name].input[layer.linear.weight_side]]
        # DequantizeLinear reads the integers; a Mul reads them behind a Cast.
        sources[layer.name] = (producer[decoder.input[0]] if decoder.op_type == "Mul" else decoder).input[0]
    values = dict(zip(sources, constants(emission.model, list(sources.values()), runtime), strict=True))
    for layer, bits in zip(layers, allocation.layer_bits, strict=True):
        kept = np.delete(np.arange(len(bits)), list(emission.removed.get(layer.name, ())))
        rows = np.moveaxis(values[layer.name].astype(np.int64), layer.linear.axis, 0).reshape(len(kept), -1)
        spans = rows.max(axis=1) - rows.min(axis=1)
        wide = np.flatnonzero(spans >= np.left_shift(1, bits[kept]))
        if len(wide):
            unit = int(wide[0])
            contents = f"{spans[unit] + 1} levels in the file, {bits[kept[unit]]} bits allocated"
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
