"""Keep layers in float that integer kernels would slow down, as times.py predicts.

Each activation a that feeds layers is read quantized (1) or in float (0), and its layers run accordingly:

    minimize  Σ_a t_a(x_a) + Σ_(a, b) n_ab c [x_a ≠ x_b]

over x, with t the times of its layers and c the cost of changing type between a layer that reads a and one that reads
what becomes of its output, b, of n elements. That is a minimum cut (Greig, Porteous, Seheult: "Exact maximum a
posteriori estimation for binary images", 1989). What no integer kernel computes between a and b, such as a gate, is
paid for by either of them that is quantized.

Only networks with HardSwish are looked at, whose kernels were profiled, and only if integers throughout are predicted
to fall short of what the best choice gives.
"""

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import pins
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.kernels.minimum_cut import source_side
from rdoq_onnx.kernels.times import CHANGE, NODE, float_time, integer_time
from rdoq_onnx.model.graph import CLAMPS, Graph, after_clamps
from rdoq_onnx.model.layers import Activation
from rdoq_onnx.observation.equalization import typical_widths
from rdoq_onnx.observation.shapes import shapes_of
from rdoq_onnx.system.runtime import Runtime

_GAIN = 1.05  # predicted, below which all layers run on integers
_FUSED = frozenset({*CLAMPS, "HardSwish", "Add"})  # computed on integers between two layers
_FORBIDDEN = 1e15
_SOURCE, _SINK = 1, 0  # of the cut: quantized and float; tensors are strings


def slow_kernels(network: Network, config: Config, samples: Samples, runtime: Runtime) -> tuple[str, ...]:
    """Choose before anything is measured, by the sizes that tensors have in a run of a few samples."""
    if not network.hard_swish_inputs:
        return ()
    shapes = shapes_of(network.model, samples, runtime)
    return slow_on_integers(network, config, {name: math.prod(shape[1:]) for name, shape in shapes.items()})


def slow_on_integers(
    network: Network, config: Config, sizes: Mapping[str, int], fallback: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the activations that layers read in float because that is faster.

    sizes: elements per sample. fallback: activations that stay in float for other reasons.
    """
    feeding = [a for a in network.activations if not a.fusion]
    if not network.hard_swish_inputs or typical_widths(config)[0] < MAX_BITS:
        return ()
    costs = _Costs.of(network, feeding, sizes)
    pinned = {a.tensor for a in feeding if any(pins(pattern, a.names) for pattern, _ in config.pins)}
    in_float = costs.in_float(fallback, Graph(network.model))
    quantized = costs.best(pinned, in_float)
    everywhere = costs.total({a.tensor for a in feeding})
    if not in_float and everywhere < _GAIN * costs.total(quantized):
        return ()
    return tuple(a.tensor for a in feeding if a.tensor not in quantized and a.tensor not in fallback)


Key = TypeVar("Key")


@dataclass(frozen=True)
class _Costs:
    """Times by activation if it is quantized, times if it is not, and of changes from one to another."""

    quantized: dict[str, float] = field(default_factory=dict)
    plain: dict[str, float] = field(default_factory=dict)
    to_float: dict[tuple[str, str], float] = field(default_factory=dict)
    to_integer: dict[tuple[str, str], float] = field(default_factory=dict)
    produced: dict[str, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, network: Network, feeding: list[Activation], sizes: Mapping[str, int]) -> "_Costs":
        costs, graph = cls(), Graph(network.model)
        sources = {f: a.tensor for a in feeding for f in a.feeds}
        produced = costs.produced
        for layer in network.layers:
            for use in layer.uses:
                tensor = sources.get(use.data)
                if tensor is not None:
                    elements = sizes[use.output]
                    costs.add(costs.quantized, tensor, integer_time(use.linear, elements))
                    costs.add(costs.plain, tensor, float_time(use.linear, elements))
                    produced[use.output] = tensor, elements
        followed: set[str] = set()
        for activation in feeding:
            outputs, fused = _origins(activation.tensor, graph, produced)
            for output in outputs if fused else ():
                source, elements = produced[output]
                pair = source, activation.tensor
                straight = after_clamps(output, graph) == activation.tensor
                change = _FORBIDDEN if straight else elements * CHANGE + NODE
                costs.add(costs.to_float, pair, change)
                costs.add(costs.to_integer, pair, elements * CHANGE + NODE)
                followed.add(output)
            if not fused:
                costs.add(costs.quantized, activation.tensor, sizes[activation.tensor] * CHANGE + NODE)
        for output, (source, elements) in produced.items():
            if output not in followed:
                costs.add(costs.quantized, source, elements * CHANGE + NODE)
        return costs

    def add(self, costs: dict[Key, float], key: Key, time: float) -> None:
        costs[key] = costs.get(key, 0.0) + time

    def in_float(self, fallback: Collection[str], graph: Graph) -> set[str]:
        """Return the activations of `fallback` and those of layers whose outputs are in `fallback`."""
        inputs = {a for output, (a, _) in self.produced.items() if after_clamps(output, graph) in fallback}
        return {a for a in self.plain if a in inputs or a in fallback}

    def total(self, quantized: set[str]) -> float:
        """Return the time if these activations are quantized."""
        time = sum(t for k, t in self.quantized.items() if k in quantized)
        time += sum(t for k, t in self.plain.items() if k not in quantized)
        time += sum(t for (a, b), t in self.to_float.items() if a in quantized and b not in quantized)
        return time + sum(t for (a, b), t in self.to_integer.items() if a not in quantized and b in quantized)

    def best(self, pinned: Collection[str], in_float: Collection[str]) -> set[str]:
        """Return the activations to quantize: all that are pinned, and else none that has to stay in float."""
        edges: dict[tuple[Hashable, Hashable], float] = {}
        for tensor in self.plain:
            lead = self.quantized[tensor] - self.plain[tensor]
            lead = -_FORBIDDEN if tensor in pinned else _FORBIDDEN if tensor in in_float else lead
            self.add(edges, (_SOURCE, tensor) if lead < 0 else (tensor, _SINK), abs(lead))
        for (a, b), time in self.to_float.items():
            self.add(edges, (a, b), time)
        for (a, b), time in self.to_integer.items():
            self.add(edges, (b, a), time)
        return {str(node) for node in source_side(edges, _SOURCE, _SINK) if node != _SOURCE}


def _origins(tensor: str, graph: Graph, produced: Mapping[str, object]) -> tuple[tuple[str, ...], bool]:
    """The layers' outputs that `tensor` is computed of, and whether integer kernels compute all in between."""
    outputs, pending, fused, seen = [], [tensor], True, set()
    while pending:
        name = pending.pop()
        if name in produced:
            outputs.append(name)
            continue
        node = graph.producer.get(name)
        if node is None or node.op_type not in _FUSED:
            fused = False
            continue
        data = [i for i in node.input if i and i not in graph.constants and i not in seen]
        seen.update(data)
        pending += data
    return tuple(outputs), fused
