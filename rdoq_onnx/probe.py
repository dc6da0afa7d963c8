"""Exact curves (Eq. 7 and 8): feed the finite perturbation to its Add of F̃, run, compare outputs.

Only what lies downstream of the Add is run: the tensors at its edge are taken from one run at s = 0. Many (channel,
width) pairs ride in one batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rdoq_onnx.analysis import Activation, Layer, Network
from rdoq_onnx.candidates import Candidates
from rdoq_onnx.distortion import Metric
from rdoq_onnx.observation import Batching, with_outputs
from rdoq_onnx.passes.insert_adds import InsertAdds, parameter
from rdoq_onnx.progress import Advance, Unfinished
from rdoq_onnx.protos import free_input, reads
from rdoq_onnx.quantizer import Affine, WeightCodes
from rdoq_onnx.runtime import Runtime, Session
from rdoq_onnx.samples import Samples
from rdoq_onnx.taylor import Distortions

_ROWS = 128  # perturbed samples in one run

Array = NDArray[Any]


@dataclass(frozen=True)
class Prober:
    """Exact measurements on `samples`."""

    network: Network
    samples: Samples
    metric: Metric
    runtime: Runtime
    batching: Batching

    def layer(
        self, layer: Layer, codes: Sequence[WeightCodes], mean: NDArray[np.float64] | float = 0.0
    ) -> NDArray[np.float64]:
        """δ of each channel of `layer`, the rest float, for each of `codes`; [units, len(codes)].

        mean [G, K]: the mean input that the layer's bias is corrected for.
        """
        rows = self.network.rows(layer)
        deltas = [c.values - rows for c in codes]
        suffix = _Suffix.of(self, "z", [u.output for u in layer.uses], [u.data for u in layer.uses])
        total = np.zeros((layer.linear.channels, len(codes)))
        pairs = [(j, w) for j in range(layer.linear.channels) for w in range(len(codes))]
        for count, tensors in suffix.batches(self):
            outputs = []
            for use in layer.uses:
                x = use.linear.unfold(tensors[use.data], count) - np.asarray(mean, np.float32)[..., None]
                outputs.append([layer.linear.grouped(d.astype(np.float32)) @ x for d in deltas])
            for chunk in _chunks(pairs, count, self.batching.rides):
                parameters = {
                    use.output: _channels_alone(layer, blocks, chunk, tensors[use.output].shape)
                    for use, blocks in zip(layer.uses, outputs, strict=True)
                }
                for (j, w), error in zip(chunk, suffix.errors(self, tensors, parameters, count), strict=True):
                    total[j, w] += error
        return total / len(self.samples)

    def whole_layer(
        self, layer: Layer, codes: Sequence[WeightCodes], mean: NDArray[np.float64] | float = 0.0
    ) -> NDArray[np.float64]:
        """δ of all channels of `layer` at once, the rest float, for each of `codes`; [len(codes)]."""
        rows = self.network.rows(layer)
        deltas = [layer.linear.grouped((c.values - rows).astype(np.float32)) for c in codes]
        suffix = _Suffix.of(self, "z", [u.output for u in layer.uses], [u.data for u in layer.uses])
        total = np.zeros(len(codes))
        for count, tensors in suffix.batches(self):
            unfolded = {
                u: u.linear.unfold(tensors[u.data], count) - np.asarray(mean, np.float32)[..., None]
                for u in layer.uses
            }
            for chunk in _chunks(range(len(codes)), count, self.batching.rides):
                parameters = {
                    u.output: np.concatenate(
                        [layer.linear.refold(deltas[k] @ unfolded[u], tensors[u.output].shape) for k in chunk]
                    )
                    for u in layer.uses
                }
                total[list(chunk)] += suffix.errors(self, tensors, parameters, count)
        return total / len(self.samples)

    def activation(self, activation: Activation, quantizers: Sequence[Affine]) -> NDArray[np.float64]:
        """δ of `activation` under each quantizer, the rest float; [len(quantizers)]."""
        suffix = _Suffix.of(self, "a", [activation.tensor], [])
        total = np.zeros(len(quantizers))
        for count, tensors in suffix.batches(self):
            a = tensors[activation.tensor]
            for chunk in _chunks(range(len(quantizers)), count, self.batching.rides):
                perturbation = np.concatenate([quantizers[k](a) - a for k in chunk])
                errors = suffix.errors(self, tensors, {activation.tensor: perturbation}, count)
                total[list(chunk)] += errors
        return total / len(self.samples)


def exact(
    network: Network,
    candidates: Candidates,
    prober: Prober,
    *,
    advance: Advance,
    unfinished: Unfinished | None = None,
) -> Distortions:
    """Measure all curves of `network` exactly; `advance(1)` after each layer and activation.

    unfinished: curves that an earlier run has measured, which are not measured again.
    """
    unfinished = unfinished or Unfinished()
    before = unfinished.get() or {"weights": (), "activations": ()}
    weights, activations = [*before["weights"]], [*before["activations"]]

    def done() -> None:
        unfinished.put({"weights": tuple(weights), "activations": tuple(activations)})
        advance(1)

    if weights:
        advance(len(weights) + len(activations))
    layers = list(zip(network.layers, candidates.weights, candidates.means, strict=True))
    for layer, variants, mean in layers[len(weights) :]:
        weights.append(np.stack([prober.layer(layer, codes, mean) for codes in variants]))
        done()
    tables = list(zip(network.activations, candidates.activations, strict=True))
    for activation, table in tables[len(activations) :]:
        activations.append(exact_activation(prober, activation, table))
        done()
    return Distortions(tuple(weights), tuple(activations), {})


def complete(measured: Distortions, network: Network, candidates: Candidates, prober: Prober) -> Distortions:
    """`measured` with the curves that it misses measured exactly."""
    lost = measured.missing
    weights = tuple(
        np.stack([prober.layer(layer, codes, mean) for codes in variants])
        if any(u.output in lost for u in layer.uses)
        else curve
        for layer, variants, mean, curve in zip(
            network.layers, candidates.weights, candidates.means, measured.weights, strict=True
        )
    )
    activations = tuple(
        exact_activation(prober, a, table) if a.tensor in lost else curves
        for a, table, curves in zip(
            network.activations, candidates.activations, measured.activations, strict=True
        )
    )
    return Distortions(weights, activations, lost)


def exact_activation(
    prober: Prober, activation: Activation, table: Mapping[int, tuple[Affine, ...]]
) -> dict[int, NDArray[np.float64]]:
    """δ of `activation` under each quantizer of each width."""
    flat = prober.activation(activation, [q for several in table.values() for q in several])
    parts = np.split(flat, np.cumsum([len(several) for several in table.values()])[:-1])
    return dict(zip(table, parts, strict=True))


def suffix_of(
    model: onnx.ModelProto, starts: Sequence[str], outputs: Sequence[str]
) -> tuple[list[str], list[onnx.NodeProto]]:
    """(tensors read at the edge, nodes) of the part of `model` that lies downstream of the tensors `starts`.

    Integers that the part reads are computed inside it: they are shapes more often than not, which must follow the
    batch that is really run.
    """
    reached = set(starts)
    for node in model.graph.node:
        if reached.intersection(reads([node])):
            reached.update(o for o in node.output if o)
    made = reached - set(starts)
    constants = {t.name for t in model.graph.initializer} | {""}
    producer = {o: n for n in model.graph.node for o in n.output}
    integers = _integers(model)
    pending = [i for n in model.graph.node if made.intersection(n.output) for i in reads([n])]
    pending += [o for o in outputs if o not in made]
    edge: dict[str, None] = {}
    while pending:
        name = pending.pop(0)
        if name in constants or name in reached or name in edge:
            continue
        if name in integers and name in producer:
            reached.update(producer[name].output)
            made.update(producer[name].output)
            pending += reads([producer[name]])
        elif name in producer or any(name == v.name for v in model.graph.input):
            edge[name] = None
    return list(edge), [n for n in model.graph.node if made.intersection(n.output)]


def _integers(model: onnx.ModelProto) -> set[str]:
    """Tensors known to be integers."""
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    return {v.name for v in known if v.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32)}


@dataclass(frozen=True)
class _Suffix:
    """F̃ downstream of some Adds, and the session that computes what it needs from the network's inputs.

    shared: tensors of the edge that do not grow with the batch.
    """

    prefix: Session
    session: Session
    edge: tuple[str, ...]
    shared: frozenset[str]
    parameters: Mapping[str, str]

    @classmethod
    def of(cls, prober: Prober, kind: str, tensors: Sequence[str], data: Sequence[str]) -> "_Suffix":
        model, outputs = prober.network.model, prober.metric.outputs
        adds = InsertAdds(tensors, ()) if kind == "a" else InsertAdds((), tensors)
        modified = adds(model)
        parameters = {t: parameter(kind, t) for t in tensors}
        edge, nodes = suffix_of(modified, list(parameters.values()), outputs)
        fetched = list(dict.fromkeys([*edge, *data, *tensors, *outputs]))
        prefix = prober.runtime.session(with_outputs(modified, fetched), "all")
        _, feeds = next(_batches(prober))
        sample = dict(zip(prefix.outputs, prefix.run(feeds), strict=True))
        shared: frozenset[str] = frozenset()
        if prober.batching.rides:
            pair = (prefix.run(prober.samples.feeds(rows)) for rows in ([0], [0, 0]))
            shared = frozenset(n for n, one, two in zip(prefix.outputs, *pair, strict=True) if one.shape == two.shape)
        inputs = [free_input(name, sample[name]) for name in edge]
        inputs += [free_input(parameters[t], sample[t]) for t in tensors]
        suffix = onnx.ModelProto()
        suffix.CopyFrom(modified)
        read = set(reads(nodes))
        graph = helper.make_graph(nodes, "suffix", inputs, [o for o in modified.graph.output if o.name in outputs])
        graph.initializer.extend(
            t for t in modified.graph.initializer if t.name in read and t.name not in parameters.values()
        )
        suffix.graph.CopyFrom(graph)
        return cls(prefix, prober.runtime.session(suffix, "all"), tuple(edge), shared, parameters)

    def batches(self, prober: Prober) -> Iterator[tuple[int, dict[str, Array]]]:
        for count, feeds in _batches(prober):
            yield count, dict(zip(self.prefix.outputs, self.prefix.run(feeds), strict=True))

    def errors(
        self, prober: Prober, tensors: Mapping[str, Array], parameters: Mapping[str, Array], count: int
    ) -> NDArray[np.float64]:
        """Sum over the samples of ‖F̃ - F‖² / D, for each perturbation stacked in `parameters`."""
        tensor, stacked = next(iter(parameters.items()))
        repeats = len(stacked) // len(tensors[tensor])
        feeds = {
            name: tensors[name] if name in self.shared else _repeated(tensors[name], repeats)
            for name in self.edge
        }
        feeds |= {self.parameters[t]: value for t, value in parameters.items()}
        values = self.session.run(feeds, prober.metric.outputs)
        reference = [_repeated(tensors[name], repeats) for name in prober.metric.outputs]
        errors = prober.metric.errors(values, reference, repeats * count)
        return np.asarray(errors.reshape(repeats, count).sum(axis=1))


def _repeated(value: Array, repeats: int) -> Array:
    """`value` so many times along axis 0; a scalar, which only one sample at a time can have, as it is."""
    return value if repeats == 1 else np.concatenate([value] * repeats)


def _channels_alone(
    layer: Layer, blocks: Sequence[Array], pairs: Sequence[tuple[int, int]], shape: tuple[int, ...]
) -> Array:
    """Δz for each (unit, width) pair: zero but for the unit's channel; stacked along axis 0."""
    stacked = np.zeros((len(pairs), *blocks[0].shape), np.float32)
    for row, (unit, width) in zip(stacked, pairs, strict=True):
        where = (slice(None), *layer.linear.block(unit))
        row[where] = blocks[width][where]
    flat = stacked.reshape(-1, *blocks[0].shape[1:])
    return layer.linear.refold(flat, (len(pairs) * shape[0], *shape[1:]))


def _chunks(items: Sequence[Any], count: int, rides: bool) -> Iterator[Sequence[Any]]:
    size = max(1, _ROWS // count) if rides else 1
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _batches(prober: Prober) -> Iterator[tuple[int, dict[str, Array]]]:
    return prober.samples.counted_batches(prober.batching.size)
