"""Run a model in stages: all batches up to a tensor, then on to the next with that tensor as the caller leaves it.

The stages together cost one pass over the samples, whatever their number. Only tensors that a later stage reads stay in
memory, for all batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.model.protos import common_sizes, declared, reads
from rdoq_onnx.system.runtime import Feeds, Runtime

Array = NDArray[Any]


def staged(
    model: onnx.ModelProto, stops: Sequence[str], batches: Sequence[Feeds], runtime: Runtime
) -> Iterator[tuple[str, list[Array]]]:
    """Yield (tensor, its value in each batch) for each of `stops` that a node produces, in order of execution.

    The rest of the model reads the values as the caller leaves them in the list.
    """
    live = [dict(feeds) for feeds in batches]
    for stage in _stages(model, stops):
        session = runtime.session(stage.model(model, live), "all")
        for tensors in live:
            tensors.update(
                zip(stage.outputs, session.run({n: tensors[n] for n in stage.inputs}, stage.outputs), strict=True)
            )
            # Freed now, so that the next batch can use the memory.
            for name in tensors.keys() - {stage.stop, *stage.needed}:
                del tensors[name]
        values = [tensors.pop(stage.stop) for tensors in live]
        yield stage.stop, values
        if stage.stop in stage.needed:
            for k, tensors in enumerate(live):
                tensors[stage.stop] = values[k]
        values.clear()  # the caller's list, too


@dataclass(frozen=True)
class _Stage:
    """Nodes that run together, the last of which produces `stop`; needed: tensors that later stages read."""

    stop: str
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    needed: frozenset[str]

    def model(self, whole: onnx.ModelProto, batches: Sequence[Feeds]) -> onnx.ModelProto:
        shapes = {name: common_sizes(tensors[name].shape for tensors in batches) for name in self.inputs}
        read = set(reads(self.nodes))
        graph = helper.make_graph(
            self.nodes,
            "stage",
            [declared(name, batches[0][name], sizes) for name, sizes in shapes.items()],
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            [t for t in whole.graph.initializer if t.name in read],
        )
        return helper.make_model(graph, ir_version=whole.ir_version, opset_imports=whole.opset_import)


def _stages(model: onnx.ModelProto, stops: Sequence[str]) -> list[_Stage]:
    parts: list[tuple[str, list[onnx.NodeProto]]] = []
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        for stop in set(stops).intersection(node.output):
            parts.append((stop, nodes))
            nodes = []
    constants = {t.name for t in model.graph.initializer}
    computed = {i.name for i in model.graph.input} - constants | {o for n in model.graph.node for o in n.output}
    stages: list[_Stage] = []
    needed: set[str] = set()
    for stop, nodes in reversed(parts):
        own = dict.fromkeys(o for n in nodes for o in n.output if o)
        inputs = {r: None for r in reads(nodes) if r in computed and r not in own}
        outputs = [o for o in own if o in needed or o == stop]
        stages.append(_Stage(stop, tuple(nodes), tuple(inputs), tuple(outputs), frozenset(needed)))
        needed |= set(inputs)
    return stages[::-1]
