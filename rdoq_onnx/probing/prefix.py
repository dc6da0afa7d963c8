"""The tensors of the float network F that parts of F̃ read: those that F̃ has at s = 0, up to its Adds.

F runs once over the samples for all suffixes (suffix.py) of a prober, and what they read is kept where it was made, on
the device, as far as there is room. The samples that it does not hold for are run again for each suffix.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.protos import reads, with_outputs
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.system.runtime import Runtime, Session, Tensor

KEPT = 768 << 20  # bytes of tensors that are kept
_FIRST = 32  # samples that they are kept of; where there are more, it is the perturbations that take the time

Array = NDArray[Any]


@dataclass(frozen=True)
class Prefix:
    """F, loaded, with what suffixes may read as its outputs.

    ends: the tensors whose distortion is measured. integers: tensors known to be such. outlines: what stands for each
    output, with its type and the shape that it has for one sample, or in one run where samples do not stack. shared:
    outputs that do not grow with the batch. memory: bytes that may be kept.
    """

    graph: Graph
    ends: tuple[str, ...]
    integers: frozenset[str]
    session: Session
    samples: Samples
    batching: Batching
    outlines: Mapping[str, Array]
    shared: frozenset[str]
    memory: int

    @classmethod
    def of(
        cls, network: Network, ends: tuple[str, ...], samples: Samples, batching: Batching, runtime: Runtime,
        memory: int,
    ) -> "Prefix":  # fmt: skip
        graph = Graph(network.model)
        integers, others = _types(network.model)
        names = [*ends, *_starts(network), *_read(graph, integers, others)]
        session = runtime.session(with_outputs(network.model, list(dict.fromkeys(names))), "all")
        _, first = next(samples.counted_batches(batching.size))
        trials = [samples.feeds([0]), samples.feeds([0, 0])] if batching.rides else [first]
        shapes = [[_outline(value) for value in session.run(feeds)] for feeds in trials]
        shared = (n for n, one, two in zip(session.outputs, *shapes, strict=True) if one.shape == two.shape)
        return cls(
            graph, ends, integers, session, samples, batching, dict(zip(session.outputs, shapes[0], strict=True)),
            frozenset(shared if batching.rides else ()), memory,
        )  # fmt: skip

    def batches(self, names: list[str]) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """(number of samples, the tensors `names` and perhaps others), batch by batch."""
        yield from self._kept
        rest = self.samples.take(slice(sum(count for count, _ in self._kept), None))
        for count, feeds in rest.counted_batches(self.batching.size):
            yield count, dict(zip(names, self.session.bound(feeds, names), strict=True))

    @cached_property
    def _kept(self) -> list[tuple[int, Mapping[str, Tensor]]]:
        """All tensors of the first batches, as far as there is room for them."""
        batches = itertools.islice(self.samples.counted_batches(self.batching.size), self._room)
        names = self.session.outputs
        return [(n, dict(zip(names, self.session.bound(feeds, names), strict=True))) for n, feeds in batches]

    @property
    def _room(self) -> int:
        """The number of batches that may be kept."""
        size = self.batching.size
        each = sum(outline.nbytes for outline in self.outlines.values())
        whole = each * min(size, len(self.samples)) if self.batching.rides else each
        return min(self.memory // whole, -(-_FIRST // size))


def _types(model: onnx.ModelProto) -> tuple[frozenset[str], frozenset[str]]:
    """Tensors known to be integers, and values known to be no tensors."""
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    integers = (v.name for v in known if v.type.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32))
    return frozenset(integers), frozenset(v.name for v in known if not v.type.HasField("tensor_type"))


def _starts(network: Network) -> Iterator[str]:
    """The tensors that are perturbed, and those that perturbations are made of."""
    yield from (name for layer in network.layers for u in layer.uses for name in (u.data, u.output))
    yield from (a.tensor for a in network.activations)


def _read(graph: Graph, integers: frozenset[str], others: frozenset[str]) -> Iterator[str]:
    """What a suffix may read beside the tensor that it starts from; of integers, what they are computed from."""
    for node in graph.nodes:
        variable = dict.fromkeys(name for name in reads([node]) if name not in graph.initializers)
        if len(variable) > 1 or not integers.isdisjoint(node.output):
            yield from (n for n in variable if n not in others and (n not in integers or n not in graph.producer))


def _outline(value: Array) -> Array:
    """An array of the type and shape of `value` that takes no memory."""
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)
