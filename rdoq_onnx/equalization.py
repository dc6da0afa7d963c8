"""Channel ranges that can be evened out without changing the network, and by how much.

An activation has one scale for all its channels, so the channel of widest range sets the step for all. Through a
positively homogeneous function f(r·x) = r·f(x) a channel's scale can move from the layer that makes it to those that
read it:

    W₁ row c · r_c,  b₁ c · r_c,  ceiling c · r_c,  W₂ column c / r_c          (Nagel et al., ICCV 2019)

A *component* is a set of tensors that must share one vector r: those joined by such functions, by Add and by pooling.
It is free if only layers make what enters it and only layers read what leaves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from rdoq_onnx.analysis import Graph, Layer, Network, analyse, attribute
from rdoq_onnx.config import Config
from rdoq_onnx.observation import with_outputs
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.equalize import Equalize
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_SPATIAL_MEANS = ((2, 3), (-2, -1), (-1, -2), (3, 2))
_MOST = 64.0  # a channel's scale is changed by this factor at most
_NARROW = 5  # bits of activations up to which evening out pays even where weights suffer
_QUIET = 1e-3  # channels under this share of the widest range are left alone: they may be dead on these samples

Float = NDArray[np.float64]


@dataclass
class Component:
    """Tensors that share one scale for each channel, and the nodes at their edge, by name.

    made, read: layers whose output channels and whose input channels these are. capped: Clip nodes within.
    """

    tensors: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)
    free: bool = True


def find_components(network: Network) -> list[Component]:
    """All free components of a network of convolutions, in graph order."""
    graph = Graph(network.model)
    single = {x.uses[0].node: x for x in network.layers if len(x.uses) == 1}
    shared = _users_of_one_weight(graph)
    parent: dict[str, str] = {}

    def root(tensor: str) -> str:
        while parent.setdefault(tensor, tensor) != tensor:
            tensor = parent[tensor]
        return tensor

    for node in graph.nodes:
        if _homogeneous(node, graph):
            for other in [i for i in node.input if i and i not in graph.constants] + [node.output[0]]:
                parent[root(other)] = root(node.output[0])
    components: dict[str, Component] = {}

    def component(tensor: str) -> Component:
        return components.setdefault(root(tensor), Component())

    for tensor in [*graph.inputs, *graph.outputs]:
        component(tensor).free = False
    for node in graph.nodes:
        for name in node.output:
            if name:
                component(name).tensors.append(name)
        if node.name in single and node.name not in shared and _scalable(single[node.name]):
            component(node.input[0]).read.append(node.name)
            component(node.output[0]).made.append(node.name)
        elif _homogeneous(node, graph):
            if node.op_type == "Clip":
                component(node.output[0]).capped.append(node.name)
        else:
            for name in (*node.input, *node.output):
                if name and name not in graph.constants:
                    component(name).free = False
    return [c for c in components.values() if c.free and c.made and c.read]


def scales_for(
    components: Sequence[Component], network: Network, ranges: Mapping[str, Float], exponent: float
) -> list[Float | None]:
    """The vector r of each component: its channels' ranges are raised towards the widest by `exponent`, 0 to 1.

    ranges: of each tensor, the range of each channel. Where only depthwise convolutions read, both sides have a scale
    for each channel, nothing is lost, and ranges are evened out in full.
    """
    layers = {x.uses[0].node: x for x in network.layers}
    result: list[Float | None] = []
    for component in components:
        known = [ranges[t] for t in component.tensors if t in ranges]
        if not known or len({len(r) for r in known}) > 1:
            result.append(None)
            continue
        channels = np.max(known, axis=0)
        power = 1.0 if all(_depthwise(layers[n]) for n in component.read) else exponent
        top = channels.max()
        loud = channels > _QUIET * top
        if power == 0 or not loud.any():
            result.append(None)
            continue
        r = np.where(loud, np.minimum((top / np.where(loud, channels, 1.0)) ** power, _MOST), 1.0)
        result.append(r)
    return result


def exponent_for(config: Config) -> float:
    """How far to even out ranges that weights pay for: wide activations are worth less than the weights' bits."""
    return 0.5 if config.activation_bits is not None and config.activation_bits <= _NARROW else 0.0


def equalize(network: Network, config: Config, samples: Samples, runtime: Runtime) -> Network:
    """`network` with its channel ranges evened out, as they are on `samples`. The network's outputs stay the same."""
    if not network.activations:
        return network
    exponent = exponent_for(config)
    components = find_components(network)
    tensors = list(dict.fromkeys(t for c in components for t in c.tensors))
    if not tensors:
        return network
    session = runtime.session(with_outputs(network.model, tensors), "all")
    sums: dict[str, Float] = {}
    total = 0
    for count, feeds in samples.counted_batches(1):
        for name, value in zip(session.outputs, session.run(feeds), strict=True):
            if value.ndim >= 2:
                axes = tuple(range(2, value.ndim))
                peaks = np.abs(value).max(axis=axes) if axes else np.abs(value)
                sums[name] = sums.get(name, 0.0) + peaks.astype(np.float64).sum(axis=0)
        total += count
    scales = scales_for(components, network, {n: s / total for n, s in sums.items()}, exponent)
    made: dict[str, Float] = {}
    read: dict[str, Float] = {}
    capped: dict[str, Float] = {}
    for component, r in zip(components, scales, strict=True):
        if r is not None:
            made.update(dict.fromkeys(component.made, r))
            read.update(dict.fromkeys(component.read, r))
            capped.update(dict.fromkeys(component.capped, r))
    return analyse(run_passes([Equalize(made, read, capped)], network.model), config)


def _homogeneous(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether scaling the channels (axis 1) of the inputs scales those of the output alike."""
    if node.domain not in ("", "ai.onnx") or not node.input:
        return False
    if node.op_type == "Add":
        return not any(i in graph.constants for i in node.input)
    if node.op_type == "Clip":
        bounds = [numpy_helper.to_array(graph.initializers[i]) for i in node.input[1:] if i in graph.initializers]
        return len(bounds) == 2 and len(node.input) == 3 and float(bounds[0]) == 0 and float(bounds[1]) > 0
    if node.op_type == "ReduceMean":
        axes = attribute(node, "axes", ())
        if len(node.input) > 1 and node.input[1] in graph.initializers:
            axes = numpy_helper.to_array(graph.initializers[node.input[1]]).tolist()
        return tuple(axes) in _SPATIAL_MEANS
    return node.op_type in HOMOGENEOUS and len(node.output) == 1


def _scalable(layer: Layer) -> bool:
    return layer.linear.op_type == "Conv" or (layer.linear.op_type == "Gemm" and not layer.linear.trans_a)


def _depthwise(layer: Layer) -> bool:
    return layer.linear.op_type == "Conv" and layer.linear.shape[1] == 1 and layer.linear.group > 1


def _users_of_one_weight(graph: Graph) -> set[str]:
    """Nodes whose weight or bias another node reads, too."""
    names: set[str] = set()
    for tensor in graph.initializers:
        readers = graph.consumers.get(tensor, [])
        if len(readers) > 1 and numpy_helper.to_array(graph.initializers[tensor]).size > 1:
            names.update(n.name for n in readers)
    return names
