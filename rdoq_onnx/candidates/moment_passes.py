"""Forward passes that collect moments, on the host or inside the graph."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.blocks import MOST_BLOCKS, Block, in_blocks
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.blocks import MOST_INPUTS
from rdoq_onnx.candidates.moments import Moments, Sums, moments_of
from rdoq_onnx.gradients.backward import declared_shapes, reverse_graph
from rdoq_onnx.gradients.plan import SHAPES
from rdoq_onnx.gradients.sum_graph import SumGraph
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.runtime import Feeds, Runtime, Session
from rdoq_onnx.system.summation import Sum
from rdoq_onnx.system.threads import Workers

MEMORY = 1 << 30  # bytes of sums per pass over the samples
Add = Callable[[Sequence[Sums], int, Feeds], None]


def collect(
    network: Network, samples: Samples, batch: int, runtime: Runtime, workers: Workers, advance: Advance
) -> tuple[Moments, ...]:
    """Collect the moments of all layers, `batch` samples at a time, in several passes if memory requires it."""
    found: dict[Layer, Moments] = {}
    for portion in portions(network.layers, MEMORY):
        found |= dict(of_inputs(replace(network, layers=tuple(portion)), samples, batch, runtime, workers, advance))
    first = first_of_input(network.layers)
    return tuple(found[first[layer.name]] for layer in network.layers)


def of_inputs(
    network: Network, samples: Samples, batch: int, runtime: Runtime, workers: Workers, advance: Advance
) -> Iterator[tuple[Layer, Moments]]:
    """Collect in one pass the moments of each layer that is the first to read its input; free their sums one by one."""
    layers = tuple(dict.fromkeys(first_of_input(network.layers).values()))
    in_graph = runtime.in_graph and len(samples.by_shape()) <= SHAPES
    work = _MomentWork(replace(network, layers=layers), runtime, workers, in_graph)
    blocks = in_blocks(samples, batch, most=1 if in_graph else MOST_BLOCKS)
    name = f"moments of {layers[0].name} on {len(samples)} samples"
    sums = list(workers.total(Sum.of(name, work, blocks), advance))
    for layer in layers:
        yield layer, moments_of(sums.pop(0))


@dataclass(frozen=True)
class _MomentWork:
    """Sums of the inputs of all layers of `network`, on the host or inside the graph."""

    network: Network
    runtime: Runtime
    workers: Workers
    in_graph: bool

    def loaded(self) -> Callable[[Block], tuple[Any, ...]]:
        graph = Graph(self.network.model)

        def fresh() -> list[Sums]:
            return [Sums(layer, graph) for layer in self.network.layers]

        tensors = list(dict.fromkeys(name for s in fresh() for name in s.tensors))
        model = with_outputs(self.network.model, tensors)
        in_numpy = None if self.in_graph else _on_host(model, self.runtime, self.workers)

        def run(block: Block) -> tuple[Any, ...]:
            sums = fresh()
            add = in_numpy or _in_graph(model, sums, self.runtime)
            for count, feeds in block.batches():
                add(sums, count, feeds)
            return tuple(s.sums() for s in sums)

        return run


def first_of_input(layers: Sequence[Layer]) -> dict[str, Layer]:
    """For each layer by name, the first one that unfolds the same input in the same way: they share their moments."""
    first: dict[object, Layer] = {}
    return {layer.name: first.setdefault(_input_of(layer), layer) for layer in layers}


def _input_of(layer: Layer) -> object:
    """Return what the moments of a layer depend on."""
    uses = [(u.data, replace(u.linear, shape=_without_channels(u.linear))) for u in layer.uses]
    return tuple(uses)


def _without_channels(linear: Linear) -> tuple[int, ...]:
    return tuple(0 if k == linear.axis else size for k, size in enumerate(linear.shape))


def _on_host(model: onnx.ModelProto, runtime: Runtime, workers: Workers) -> Add:
    """Sum the outputs of `model` in numpy."""
    session = runtime.session(model, "all")

    def add(sums: Sequence[Sums], count: int, feeds: Feeds) -> None:
        values = dict(zip(session.outputs, session.run(feeds), strict=True))
        workers.map(partial(Sums.add, values=values, samples=count), sums)

    return add


def _in_graph(model: onnx.ModelProto, appended: Sequence[Sums], runtime: Runtime) -> Add:
    """Sum the outputs of `model` by nodes appended to it, rebuilt whenever the shape of a batch changes."""
    sessions: dict[tuple[tuple[int, ...], ...], Session] = {}

    def add(sums: Sequence[Sums], count: int, feeds: Feeds) -> None:
        shapes = tuple(value.shape for value in feeds.values())
        if shapes not in sessions:
            sessions.clear()
            forward = reverse_graph(model, feeds, runtime, fetch=[o.name for o in model.graph.output]).model
            graph = SumGraph(forward, declared_shapes(forward.graph.output), count)
            for s in appended:
                s.append(graph)
            sessions[shapes] = runtime.session(graph.model(), "all")
        values = iter(sessions[shapes].bound(feeds))
        for s in sums:
            s.add_sums(values)

    return add


def passes(network: Network) -> int:
    """Return the number of passes of `collect` over the samples."""
    return sum(1 for _ in portions(network.layers, MEMORY))


def portions(layers: Sequence[Layer], memory: int, shared: bool = True) -> Iterator[list[Layer]]:
    """Divide `layers` so that the second moments of a portion take at most `memory` bytes, in double.

    shared: whether layers that read the same input have one in common.
    """
    first = first_of_input(layers)
    portion: list[Layer] = []
    total = 0
    for layer in layers:
        size = 0 if shared and first[layer.name] in portion else second_bytes(layer)
        if portion and size and total + size > memory:
            yield portion
            portion, total = [], 0
            size = second_bytes(layer)
        portion.append(layer)
        total += size
    yield portion


def second_bytes(layer: Layer) -> int:
    """Return the bytes of a layer's second moment, in double."""
    groups, inputs = layer.linear.group, layer.linear.inputs
    return 8 * groups * inputs * min(inputs, MOST_INPUTS)
