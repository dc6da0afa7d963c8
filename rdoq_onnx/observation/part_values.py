"""Reading the parts out of a network's outputs: which elements of an output each part fills.

Which ones is found by running the tail of the network, from the tensors that a Concat joins to the output, once with
each of them at 1 and all others at 0: what changes is that part's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from rdoq_onnx.model.protos import reads, with_outputs
from rdoq_onnx.observation.confidence import sqnr_bound
from rdoq_onnx.observation.distortion import Metric, sqnr_db
from rdoq_onnx.observation.parts import Outputs, Part, Piece
from rdoq_onnx.system.runtime import Feeds, Runtime

Array = NDArray[Any]
Mask = NDArray[np.bool_]


Float = NDArray[np.float64]
Values = list[list[Float]]  # of each part, its pieces, [samples, elements]


@dataclass(frozen=True)
class PartPowers:
    """Powers of a run for each sample and part, [samples, parts]: of the float signal, and of the noise."""

    signal: Float
    noise: Float

    @property
    def sqnr_db(self) -> list[float]:
        """The SQNR of each part."""
        return [sqnr_db(*pair) for pair in zip(self.signal.sum(axis=0), self.noise.sum(axis=0), strict=True)]

    @property
    def bounds_db(self) -> list[float]:
        """The lower bound of each part's SQNR, one-sided 95 %."""
        return [sqnr_bound(self.signal[:, k], self.noise[:, k]) for k in range(self.signal.shape[1])]

    @property
    def worst(self) -> int:
        """The index of the part with the lowest SQNR."""
        return int(np.argmin(self.sqnr_db))

    @classmethod
    def joined(cls, batches: Sequence["PartPowers"]) -> "PartPowers":
        return cls(np.concatenate([b.signal for b in batches]), np.concatenate([b.noise for b in batches]))


@dataclass(frozen=True, eq=False)
class PartReader:
    """Reads the parts of `metric` from the outputs of any network that computes what `model` does."""

    model: onnx.ModelProto
    metric: Metric
    runtime: Runtime
    _masks: dict[tuple[Any, ...], dict[str, Mask]] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """The tensors that `read` takes: outputs of the network, and tensors in front of a selection."""
        pieces = (piece for part in self.parts for piece in part.pieces)
        return list(dict.fromkeys(p.value if p.kind == "selected" else p.output for p in pieces))

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.metric.parts

    @property
    def inner(self) -> list[str]:
        """Those of `outputs` that are no outputs of the network."""
        own = {piece.output for part in self.parts for piece in part.pieces}
        return [name for name in self.outputs if name not in own]

    def powers(self, reference: Values, values: Values) -> PartPowers:
        """Return the powers of one batch of a run, whose noise is what `values` is off by."""
        return PartPowers(self._power(reference), self.gap(reference, values))

    def gap(self, one: Values, other: Values) -> Float:
        """Return the power of the difference between two runs, [samples, parts]."""
        return self._power([[a - b for a, b in zip(*pieces, strict=True)] for pieces in zip(one, other, strict=True)])

    def _power(self, values: Values) -> Float:
        """Power of each part; pieces of one part are brought to the same power first."""
        weights = iter(self.metric.weights)
        columns = []
        for pieces in values:
            own = [next(weights) for _ in pieces]
            factors = [w**2 for w in own] if len(own) > 1 else [1.0]
            columns.append(sum(w * np.square(v).sum(axis=1) for w, v in zip(factors, pieces, strict=True)))
        return np.stack(columns, axis=1)

    def read(self, values: Mapping[str, Array], feeds: Feeds, count: int) -> Values:
        """For each part its pieces on `count` samples, [samples, elements], of `values` by the names of `outputs`."""
        masks = self._masks_for(feeds)

        def piece_of(piece: Piece) -> Float:
            if piece.kind == "selected":
                return values[piece.value].astype(np.float64).reshape(count, -1)
            value = values[piece.output].astype(np.float64)
            chosen = value[masks[piece.value]] if piece.kind == "joined" else value
            return chosen.reshape(count, -1)

        return [[piece_of(piece) for piece in part.pieces] for part in self.parts]

    def _masks_for(self, feeds: Feeds) -> dict[str, Mask]:
        joined: dict[str, list[str]] = {}
        for piece in (p for part in self.parts for p in part.pieces if p.kind == "joined"):
            joined.setdefault(piece.output, []).append(piece.value)
        if not joined:
            return {}
        key = tuple((name, np.shape(value)) for name, value in sorted(feeds.items()))
        if key not in self._masks:
            self._masks[key] = {}
            for output, values in joined.items():
                self._masks[key] |= _masks(self.model, output, values, feeds, self.runtime)
        return self._masks[key]


def _masks(
    model: onnx.ModelProto, output: str, values: Sequence[str], feeds: Feeds, runtime: Runtime
) -> dict[str, Mask]:
    """Where `output` holds each of `values`, on a batch of the shape of `feeds`."""
    outputs = Outputs(model)
    end = outputs.end(output)
    leaves, nodes = outputs.leaves(end), outputs.tail(end)
    stored = {t.name: t for t in model.graph.initializer}
    made = {o for n in nodes for o in n.output}
    read = [name for name in dict.fromkeys([*leaves, *reads(nodes)]) if name not in made and name not in stored]
    given = {name: np.asarray(feeds[name]) for name in read if name in feeds}
    inner = [name for name in read if name not in given]
    given |= dict(zip(inner, runtime.session(with_outputs(model, inner), "basic").run(feeds, inner), strict=True))
    marked = {name: np.zeros_like(v) if name in leaves else v for name, v in given.items()}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in marked.items()
    ]
    used = [stored[name] for name in dict.fromkeys(reads(nodes)) if name in stored]
    graph = helper.make_graph(nodes, "tail", inputs, [onnx.ValueInfoProto(name=end)], used)
    tail = helper.make_model(graph, ir_version=model.ir_version, opset_imports=model.opset_import)
    session = runtime.session(tail, "none")
    (before,) = session.run(marked, [end])
    return {
        value: np.asarray(session.run({**marked, value: np.ones_like(marked[value])}, [end])[0] != before)
        for value in values
    }
