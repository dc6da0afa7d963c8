"""Compare a quantized model, of whatever tool, with the float one on the same samples, by the figures of a report."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import FloatFallback, Measurement, aimed_at
from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.part_values import PartPowers
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.refinement.reference import Agreement, Reference, classifies, top_classes
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.verification.part_figures import Parts, part_figures


@dataclass(frozen=True)
class Comparison(Parts):
    """What a quantized model gives on `samples`, beside the float model.

    agreement: of the top class, and the accuracy where the samples have labels, for
    classifiers. divergence: of rows of logits, in nats a row; None without any.
    """

    samples: int
    agreement: Agreement | None = None
    divergence: float | None = None

    def __repr__(self) -> str:
        kept = "" if self.agreement is None else f", {100 * self.agreement.share:.1f} % keep their top class"
        return f"Comparison({self.sqnr_db:.2f} dB on {self.samples} samples{kept})"


def unmeasured(network: Network, samples: Samples, runtime: Runtime) -> Measurement:
    """Return a measurement of `network` without layers: how its outputs on `samples` are read and compared."""
    parts = find_parts(network.model)
    aimed = aimed_at(replace(network, layers=(), activations=(), stored=(), products=()), measured_tensors(parts))
    curves = Curves(np.arange(1), np.zeros(0, np.int64), np.zeros((0, 1)))
    observation = observe(aimed, parts, samples, runtime)
    return Measurement(network.model, aimed, observation, (), (), curves, FloatFallback({}, {}), {}, {})


def compared(quantized: onnx.ModelProto, reference: Reference) -> Comparison:
    """Run `quantized` at ONNX Runtime's default level on the samples of `reference`.

    Raises ModelError if its inputs, outputs or shapes are not those of the float model.
    """
    metric, reader = reference.measurement.observation.metric, reference.reader
    _check_names(quantized, reference)
    made = {o for node in quantized.graph.node for o in node.output}
    ends = [name for name in metric.outputs if name in made]
    whole = with_outputs(quantized, [*dict.fromkeys([*reference.outputs, *ends])])
    session = reference.runtime.session(whole, "all")
    divergence = metric.divergence if ends == list(metric.outputs) else None
    powers, rows, expected, found = [], [], [], []
    for batch in reference.batches():
        values = dict(zip(session.outputs, session.run(batch.feeds), strict=True))
        read = reference.read([values[name] for name in reference.outputs], batch.feeds, batch.count)
        _check_shapes(batch.expected, read)
        powers.append(reader.powers(batch.expected, read))
        expected.append(top_classes(batch.expected))
        found.append(top_classes(read))
        if divergence is not None:
            rows.append(divergence.errors([values[name] for name in ends], batch.aimed, batch.count))
    agreement = Agreement.of(np.concatenate(expected), np.concatenate(found), reference.samples.classes)
    return Comparison(
        part_figures(reference.reader.parts, PartPowers.joined(powers)),
        len(reference.samples),
        agreement if classifies(reference) else None,
        float(np.concatenate(rows).mean()) if rows else None,
    )


def _check_names(quantized: onnx.ModelProto, reference: Reference) -> None:
    """Raise ModelError unless `quantized` takes the float model's inputs and gives the tensors to compare."""
    stored = {t.name for t in quantized.graph.initializer}
    samples = reference.samples
    _same_names("inputs", {i.name for i in quantized.graph.input} - stored, {*samples.arrays, *samples.constants})
    made = {o for node in quantized.graph.node for o in node.output}
    lacking = [name for name in reference.outputs if name not in made]
    if lacking:
        where = "output" if lacking[0] not in reference.reader.inner else "tensor in front of a selection,"
        raise ModelError(f"the quantized model has no {where} {lacking[0]!r}; give one made of the float model")


def _same_names(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        names = ", ".join(map(repr, sorted(found ^ expected)))
        raise ModelError(f"the {what} of the two models differ in {names}; give one made of the float model")


def _check_shapes(expected: Iterable[Iterable[np.ndarray]], found: Iterable[Iterable[np.ndarray]]) -> None:
    for pieces in zip(expected, found, strict=True):
        for one, other in zip(*pieces, strict=True):
            if one.shape != other.shape:
                shapes = f"{[*one.shape]} and {[*other.shape]}"
                raise ModelError(
                    f"an output has the shapes {shapes} in the two models; give one made of the float model"
                )
