"""Tensors of the float network F that parts of F̃ consume, i.e. those of F̃ at s = 0 up to its Adds.

F runs once over the samples for all suffixes (suffix.py) of a prober. The tensors that these consume are cached on the
device that computed them, as far as memory allows; the remaining samples run again for each suffix.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.shape_inference import infer_shapes

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.protos import reads, with_outputs
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.system.runtime import Runtime, Session, Tensor

CACHE_BYTES = 768 << 20  # default limit of a cache
_CACHED_SAMPLES = 32  # at most; with more samples, most time goes into the perturbations

Array = NDArray[Any]


@dataclass(frozen=True)
class Prefix:
    """A session of F whose outputs are the tensors that suffixes may consume.

    ends: measured outputs. integers: integer tensors. outlines: for each output, an array of its dtype and of its shape
    for the largest sample, or for its run if samples are not stackable. sizes: the known sizes of each output, else
    None. shared: outputs that do not grow with the batch. memory: bytes that may be cached.
    """

    graph: Graph
    ends: tuple[str, ...]
    integers: frozenset[str]
    session: Session
    samples: Samples
    batching: Batching
    outlines: Mapping[str, Array]
    sizes: Mapping[str, Sequence[int | None]]
    shared: frozenset[str]
    memory: int

    @classmethod
    def of(
        cls,
        network: Network,
        ends: tuple[str, ...],
        samples: Samples,
        batching: Batching,
        runtime: Runtime,
        memory: int,
    ) -> "Prefix":
        graph = Graph(network.model)
        inferred = infer_shapes(network.model).graph
        integers, others = _types(inferred)
        names = [*ends, *_starts(network), *_consumed(graph, integers, others)]
        session = runtime.session(with_outputs(network.model, list(dict.fromkeys(names))), "all")
        largest = samples.largest
        one = samples.take(slice(largest, largest + (samples.batch or 1)))
        trials = [one.feeds([0]), one.feeds([0, 0])] if batching.stackable else [one.feeds(slice(None))]
        shapes = [[_outline(value) for value in session.run(feeds)] for feeds in trials]
        outlines = dict(zip(session.outputs, shapes[0], strict=True))
        shared = (n for n, one, two in zip(session.outputs, *shapes, strict=True) if one.shape == two.shape)
        return cls(
            graph,
            ends,
            integers,
            session,
            samples,
            batching,
            outlines,
            _sizes(inferred, outlines),
            frozenset(shared if batching.stackable else ()),
            memory,
        )

    def batches(self, names: list[str]) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Yield (number of samples, the tensors `names` and possibly others), batch by batch."""
        yield from self._cached
        rest = self.samples.take(slice(sum(count for count, _ in self._cached), None))
        for count, feeds in rest.counted_batches(self.batching.size):
            yield count, dict(zip(names, self.session.bound(feeds, names), strict=True))

    @cached_property
    def _cached(self) -> list[tuple[int, Mapping[str, Tensor]]]:
        """All outputs of the first batches, as far as memory allows."""
        batches = itertools.islice(self.samples.counted_batches(self.batching.size), self._cached_batches)
        names = self.session.outputs
        return [(n, dict(zip(names, self.session.bound(feeds, names), strict=True))) for n, feeds in batches]

    @property
    def _cached_batches(self) -> int:
        """Number of batches to cache."""
        size = self.batching.size
        each = sum(outline.nbytes for outline in self.outlines.values())
        batch = each * min(size, len(self.samples)) if self.batching.stackable else each
        return min(self.memory // batch, -(-_CACHED_SAMPLES // size))


def _types(inferred: onnx.GraphProto) -> tuple[frozenset[str], frozenset[str]]:
    """Return the integer tensors, and the values that are not tensors, as far as shape inference can tell."""
    values = inferred.value_info
    integers = (v.name for v in values if v.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32))
    return frozenset(integers), frozenset(v.name for v in values if not v.type.HasField("tensor_type"))


def _sizes(inferred: onnx.GraphProto, outlines: Mapping[str, Array]) -> dict[str, list[int | None]]:
    """Return the inferred sizes of each tensor of `outlines`; axis 0 varies with the batch."""
    values = {v.name: v for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    sizes: dict[str, list[int | None]] = {}
    for name, outline in outlines.items():
        known = [d.dim_value for d in values[name].type.tensor_type.shape.dim] if name in values else []
        known = known if len(known) == outline.ndim else [0] * outline.ndim
        # An inferred size that differs from the observed one is an error of shape inference.
        sizes[name] = [
            size if axis and size == seen else None
            for axis, (size, seen) in enumerate(zip(known, outline.shape, strict=True))
        ]
    return sizes


def _starts(network: Network) -> Iterator[str]:
    """Yield the perturbed tensors, and those from which perturbations are computed."""
    yield from (name for layer in network.layers for u in layer.uses for name in (u.data, u.output))
    yield from (a.tensor for a in network.activations)


def _consumed(graph: Graph, integers: frozenset[str], others: frozenset[str]) -> Iterator[str]:
    """Yield what a suffix may consume besides its perturbed tensors; for integers, what they are computed from."""
    for node in graph.nodes:
        variable = dict.fromkeys(name for name in reads([node]) if name not in graph.initializers)
        if len(variable) > 1 or not integers.isdisjoint(node.output):
            yield from (n for n in variable if n not in others and (n not in integers or n not in graph.producer))


def _outline(value: Array) -> Array:
    """Return an array of the dtype and shape of `value` that takes no memory."""
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)
