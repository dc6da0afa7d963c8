"""Forward passes that collect moments, on the host or inside the graph."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.blocks import MOST_INPUTS
from rdoq_onnx.candidates.moments import Moments, Sums
from rdoq_onnx.gradients.backward import declared_shapes, reverse_graph
from rdoq_onnx.gradients.plan import SHAPES
from rdoq_onnx.gradients.sum_graph import SumGraph
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.runtime import Feeds, Runtime, Session
from rdoq_onnx.system.threads import Workers

_MEMORY = 1 << 30  # bytes of sums per pass over the samples
Add = Callable[[int, Feeds], None]


def collect(
    network: Network, samples: Samples, batch: int, runtime: Runtime, workers: Workers, advance: Advance
) -> tuple[Moments, ...]:
    """Collect the moments of all layers, `batch` samples at a time, in several passes if memory requires it."""
    result: list[Moments] = []
    graph = Graph(network.model)
    for layers in _portions(network.layers):
        sums = [Sums(layer, graph) for layer in layers]
        tensors = list(dict.fromkeys(name for s in sums for name in s.tensors))
        model = with_outputs(network.model, tensors)
        in_graph = runtime.in_graph and len(samples.by_shape()) <= SHAPES
        add = _in_graph(model, sums, runtime) if in_graph else _on_host(model, sums, runtime, workers)
        for count, feeds in samples.counted_batches(batch):
            add(count, feeds)
            advance(count)
        result += [s.result() for s in sums]
    return tuple(result)


def _on_host(model: onnx.ModelProto, sums: Sequence["Sums"], runtime: Runtime, workers: Workers) -> Add:
    """Sum the outputs of `model` in numpy."""
    session = runtime.session(model, "all")

    def add(count: int, feeds: Feeds) -> None:
        values = dict(zip(session.outputs, session.run(feeds), strict=True))
        workers.map(partial(Sums.add, values=values, samples=count), sums)

    return add


def _in_graph(model: onnx.ModelProto, sums: Sequence["Sums"], runtime: Runtime) -> Add:
    """Sum the outputs of `model` by nodes appended to it, rebuilt whenever the shape of a batch changes."""
    sessions: dict[tuple[tuple[int, ...], ...], Session] = {}

    def add(count: int, feeds: Feeds) -> None:
        shapes = tuple(value.shape for value in feeds.values())
        if shapes not in sessions:
            sessions.clear()
            forward = reverse_graph(model, feeds, runtime, fetch=[o.name for o in model.graph.output]).model
            graph = SumGraph(forward, declared_shapes(forward.graph.output), count)
            for s in sums:
                s.append(graph)
            sessions[shapes] = runtime.session(graph.model(), "all")
        values = iter(sessions[shapes].bound(feeds))
        for s in sums:
            s.add_sums(values)

    return add


def passes(network: Network) -> int:
    """Return the number of passes of `collect` over the samples."""
    return sum(1 for _ in _portions(network.layers))


def _portions(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    portion: list[Layer] = []
    total = 0
    for layer in layers:
        groups, inputs = layer.linear.group, layer.linear.inputs
        size = 8 * groups * inputs * min(inputs, MOST_INPUTS)
        if portion and total + size > _MEMORY:
            yield portion
            portion, total = [], 0
        portion.append(layer)
        total += size
    yield portion
