"""The float model that emitted models are compared with, on samples that no measurement has used."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.binding import Binding
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.model.external import is_huge
from rdoq_onnx.model.graph import Graph
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.confidence import share_bound
from rdoq_onnx.observation.part_values import PartPowers, PartReader, Values
from rdoq_onnx.refinement.judge import FLOAT_MEMORY
from rdoq_onnx.system.runtime import Feeds, Runtime, Session

Arrays = tuple[NDArray[Any], ...]
Classes = NDArray[np.int64]
_EMBEDS = frozenset({"Div", "LayerNormalization", "LpNormalization", "Tanh"})  # the last node of an embedding
FloatRuns = Iterable[tuple[Arrays, Arrays]]  # per batch: what a PartReader reads, what distortion is measured of


@dataclass(frozen=True)
class Batch:
    """One batch: its feeds, the parts of the float outputs, and the float tensors that distortion is measured of."""

    count: int
    feeds: Feeds
    expected: Values
    aimed: Arrays


@dataclass(frozen=True)
class Reference:
    """The float model `original` on `samples`; measurement: of the network that is compared with it.

    floats: the `float_runs`, the same for all budgets; None if they are too large to keep.
    """

    original: onnx.ModelProto
    measurement: Measurement
    samples: Samples
    runtime: Runtime
    floats: FloatRuns | None = None

    def kept(self, steps: Steps) -> "Reference":
        """The same with float outputs that `steps` keeps for the next budget, unless they are too large."""
        if 8 * self.measurement.observation.metric.elements * len(self.samples) > FLOAT_MEMORY:
            return self
        # Models that normalize to the same one still differ by rounding, so the key names the original.
        key = f"outputs of {Binding.of(self.original, '', {}).model} on {self.samples.digest}"
        floats = steps.once(key, lambda: tuple(self._float_runs()))
        return Reference(self.original, self.measurement, self.samples, self.runtime, floats)

    @cached_property
    def reader(self) -> PartReader:
        metric = self.measurement.observation.metric
        return PartReader(self.measurement.network.model, metric, self.runtime)

    @property
    def outputs(self) -> list[str]:
        """The tensors that `readable` models give, and `batches` reads."""
        return self.reader.outputs

    def readable(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """`model` with the tensors in front of a selection as outputs, too."""
        inner = self.reader.inner
        return with_outputs(model, [*(o.name for o in model.graph.output), *inner]) if inner else model

    def batches(self) -> Iterator[Batch]:
        """All samples, batch by batch."""
        size = self.measurement.observation.batching.size
        floats = self.floats if self.floats is not None else self._float_runs()
        for (count, feeds), (values, aimed) in zip(self.samples.counted_batches(size), floats, strict=True):
            yield Batch(count, feeds, self.read(values, feeds, count), aimed)

    def read(self, values: Iterable[NDArray[Any]], feeds: Feeds, count: int) -> Values:
        """The parts of one batch of `outputs`."""
        return self.reader.read(dict(zip(self.outputs, values, strict=True)), feeds, count)

    def powers(self, model: onnx.ModelProto) -> PartPowers:
        """Measure a quantized model, at ONNX Runtime's default level."""
        session = self.runtime.session(self.readable(model), "all")
        return PartPowers.joined(
            [
                self.reader.powers(b.expected, self.read(session.run(b.feeds, self.outputs), b.feeds, b.count))
                for b in self.batches()
            ]
        )

    def agreement(self, model: onnx.ModelProto) -> "Agreement":
        """Count the samples whose top class a quantized model keeps."""
        session = self.runtime.session(model, "all")
        expected, found = [], []
        for b in self.batches():
            expected.append(top_classes(b.expected))
            found.append(top_classes(self.read(session.run(b.feeds, self.outputs), b.feeds, b.count)))
        return Agreement.of(np.concatenate(expected), np.concatenate(found), self.samples.classes)

    def _float_runs(self) -> Iterator[tuple[Arrays, Arrays]]:
        metric, inner = self.measurement.observation.metric, self.reader.inner
        own = [name for name in self.outputs if name not in inner]
        aimed = self.measurement.aimed.model
        names = list(dict.fromkeys([*metric.outputs, *inner]))
        models = (self.original, with_outputs(aimed, names) if inner else aimed)
        loads: list[Callable[[], Session]] = [partial(self.runtime.session, model, "all") for model in models]
        if not is_huge(self.original):  # sessions of a huge one are made for each batch: one is alive at a time
            loads = [cache(load) for load in loads]
        reference, session = loads
        for feeds in self.samples.batches(self.measurement.observation.batching.size):
            values = dict(zip(names, session().run(feeds, names), strict=True))
            outputs = dict(zip(own, reference().run(feeds, own) if own else (), strict=True))
            outputs |= {name: values[name] for name in inner}
            yield tuple(outputs[n] for n in self.outputs), tuple(values[n] for n in metric.outputs)


@dataclass(frozen=True)
class Agreement:
    """How many of `samples` keep their top class.

    accuracy: shares whose top class is the label, of the float and of the quantized model; None without labels.
    """

    hits: int
    samples: int
    accuracy: tuple[float, float] | None = None

    @classmethod
    def of(cls, expected: Classes, found: Classes, labels: Classes | None = None) -> "Agreement":
        """Compare top classes [samples]."""
        accuracy = None if labels is None else (float((expected == labels).mean()), float((found == labels).mean()))
        return cls(int((expected == found).sum()), len(expected), accuracy)

    @property
    def share(self) -> float:
        return self.hits / max(self.samples, 1)

    @property
    def bound(self) -> float:
        """The one-sided 95 % bound of the share."""
        return share_bound(self.hits, self.samples)

    def rows(self) -> list[tuple[str, str]]:
        """Word the figures as (figure, value) rows."""
        kept = f"{100 * self.share:.1f} % of {self.samples} samples, at least {100 * self.bound:.1f} % (95 %)"
        if self.accuracy is None:
            return [("top class kept", kept)]
        before, after = (f"{100 * share:.1f} %" for share in self.accuracy)
        return [("top class kept", kept), ("accuracy", f"{after}; the float model has {before}")]

    def document(self) -> dict[str, Any]:
        """The figures for JSON, shares in percent."""
        accuracy = None
        if self.accuracy is not None:
            before, after = self.accuracy
            accuracy = {"float_percent": 100 * before, "percent": 100 * after}
        shares = {"percent": 100 * self.share, "bound_percent": 100 * self.bound}
        return {**shares, "samples": self.samples, "accuracy": accuracy}


def top_classes(values: Values) -> Classes:
    """Return where the greatest score of each sample is, of the first tensor."""
    classes: Classes = values[0][0].argmax(axis=1)
    return classes


def classifies(reference: Reference) -> bool:
    """Whether the model gives one row of scores per sample, and nothing else: a vector that is not normalized."""
    outputs, parts = reference.original.graph.output, reference.measurement.observation.metric.parts
    if len(outputs) != 1 or len(parts) != 1 or parts[0].pieces[0].kind != "whole":
        return False
    size = reference.samples.batch or 1
    session = reference.runtime.session(reference.original, "all")
    (value,) = session.run(reference.samples.feeds(slice(0, size)), [outputs[0].name])
    maker = Graph(reference.original).producer.get(outputs[0].name)
    return value.ndim == 2 and value.shape[1] > 1 and maker is not None and maker.op_type not in _EMBEDS
