"""Verify the emitted model on held-out samples, which no measurement has used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.emission.tensorrt_rules import violations
from rdoq_onnx.errors import ModelError, VerificationError
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.part_values import PartPowers
from rdoq_onnx.observation.parts import Part
from rdoq_onnx.refinement.judge import FLOAT_MEMORY
from rdoq_onnx.refinement.reference import Agreement, Reference, classifies, top_classes
from rdoq_onnx.targets import COMPLETE, Target
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, check_agreement
from rdoq_onnx.verification.kernels import float_layers, kernel_counts
from rdoq_onnx.verification.part_figures import Parts, part_figures
from rdoq_onnx.verification.runs import LEVELS, Load, onnxruntime_runs, openvino_runs
from rdoq_onnx.verification.widths import check_widths

Array = NDArray[Any]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Verification(Parts):
    """Measurements of the emitted model on the held-out samples.

    part_errors: what each part adds to δ, in the unit of the predicted one. level_gap: δ between ONNX Runtime's BASIC
    and default optimization levels. kernels: node counts of the graph that the default level optimizes to.
    float_layers: nodes of quantized layers that the default level runs in float, with the reason. samples: number of
    samples. agreement: of the top class, for classifiers. powers: of the float outputs and the noise, by sample and
    part. divergence: of rows of logits, in nats a row; None without any.
    """

    part_errors: tuple[float, ...]
    level_gap: float
    kernels: Mapping[str, int]
    float_layers: Mapping[str, str]
    samples: int
    agreement: Agreement | None = None
    powers: PartPowers | None = None
    divergence: float | None = None

    @property
    def measured(self) -> float:
        """δ of all parts."""
        return sum(self.part_errors)


def verify(emission: Emission, allocation: Allocation, reference: Reference) -> Verification:
    """Run the emitted model in ONNX Runtime and compare it with the float model.

    It runs at the BASIC and the default optimization level, with one thread and with all threads of the runtime, and in
    OpenVINO if that is the target and is installed. Figures are those of the default level, whose integer kernels stand
    for the target's; those of the BASIC level if the target's kernels do not saturate.

    Raises VerificationError if the file does not load, exceeds the allocated widths, breaks a rule of its target, or
    gives outputs that are not finite or differ from run to run.
    """
    runtime, target = reference.runtime, allocation.measurement.network.target
    check_widths(emission, allocation, runtime)
    broken = violations(emission.model) if target.name == "tensorrt" else ()
    if broken:
        raise VerificationError(f"the emitted model breaks a rule of TensorRT: {broken[0]}")
    try:
        runs = onnxruntime_runs(reference.readable(emission.model), runtime)
        if target.name == "openvino":
            runs |= openvino_runs(reference.readable(emission.model), runtime.threads)
        compared = _compared(emission.model, runs, _reported_level(target), reference)
    except ModelError as error:
        fix = f"; upgrade ONNX Runtime to {'.'.join(map(str, COMPLETE))}" if runtime.version < COMPLETE else ""
        raise VerificationError(f"the emitted model does not run: {error}{fix}") from error
    if not np.isfinite(compared.measured).all():
        raise VerificationError("the outputs of the emitted model are not finite")
    parts = allocation.measurement.observation.metric.parts
    if target.saturates:
        compared.check(parts)
    return Verification(
        part_figures(parts, compared.powers),
        tuple(compared.measured.tolist()),
        compared.level_gap if target.saturates else 0.0,
        kernel_counts(compared.optimized),
        float_layers(compared.optimized, allocation.measurement.network),
        len(reference.samples),
        compared.agreement if classifies(reference) else None,
        compared.powers,
        compared.divergence,
    )


@dataclass(frozen=True)
class _Compared:
    """What each part adds to δ; powers by sample and part: reported run, level gap, noise of each run.

    optimized: the graph of the default level. divergence: the mean over samples, None without rows of logits.
    """

    optimized: onnx.ModelProto
    measured: Float
    powers: PartPowers
    gap: Float
    noises: Mapping[str, Float]
    agreement: Agreement
    divergence: float | None

    def check(self, parts: tuple[Part, ...]) -> None:
        """Raise VerificationError if the runs do not agree on some part."""
        for k, part in enumerate(parts):
            noises = {where: noise[:, k] for where, noise in self.noises.items()}
            check_agreement(self.powers.signal[:, k], noises, self.gap[:, k], part.name if len(parts) > 1 else "")

    @property
    def level_gap(self) -> float:
        """δ between the levels."""
        shares = self.gap.sum(axis=0) / np.maximum(self.powers.noise.sum(axis=0), 1e-300)
        return float((self.measured * shares).sum())


def _reported_level(target: Target) -> str:
    """Return the optimization level whose figures are reported."""
    return DEFAULT if target.saturates else BASIC


def _compared(quantized: onnx.ModelProto, runs: Mapping[str, Load], reported: str, reference: Reference) -> _Compared:
    metric, names, reader = reference.measurement.observation.metric, reference.outputs, reference.reader
    # One session after another: together they may not fit in memory.
    ran = {where: _outputs(load, names, where, reference) for where, load in runs.items()}
    for where, (outputs, _) in ran.items():
        _check_shapes(where, names, outputs[0], ran[reported][0][0])
    (optimized,) = (graph for _, graph in ran.values() if graph is not None)
    # Additional outputs may change how the model is fused, so they get a session of their own.
    inner = None if set(metric.outputs) <= set(names) else with_outputs(quantized, metric.outputs)
    session = None if inner is None else reference.runtime.session(inner, LEVELS[reported])
    measured, powers, gaps, expected, found = [], [], [], [], []
    divergence, rows = metric.divergence, []
    noises: dict[str, list[Float]] = {where: [] for where in runs}
    for k, batch in enumerate(reference.batches()):
        raw = {where: outputs[k] for where, (outputs, _) in ran.items()}
        values = {}
        for where, several in noises.items():
            read = reference.read(raw[where], batch.feeds, batch.count)
            several.append(reader.gap(batch.expected, read))
            if where in LEVELS:
                values[where] = read
        powers.append(reader.powers(batch.expected, values[reported]))
        gaps.append(reader.gap(values[DEFAULT], values[BASIC]))
        named = dict(zip(names, raw[reported], strict=True))
        ends = session.run(batch.feeds) if session is not None else [named[n] for n in metric.outputs]
        measured.append(metric.part_errors(ends, batch.aimed, batch.count))
        if divergence is not None:
            rows.append(divergence.errors(ends, batch.aimed, batch.count))
        expected.append(top_classes(batch.expected))
        found.append(top_classes(values[reported]))
    return _Compared(
        optimized,
        np.concatenate(measured).mean(axis=0),
        PartPowers.joined(powers),
        np.concatenate(gaps),
        {where: np.concatenate(several) for where, several in noises.items()},
        Agreement.of(np.concatenate(expected), np.concatenate(found), reference.samples.classes),
        float(np.concatenate(rows).mean()) if rows else None,
    )


def _check_shapes(where: str, names: Sequence[str], outputs: Sequence[Array], expected: Sequence[Array]) -> None:
    """Raise ModelError if outputs of one runtime have other shapes than those of another."""
    for name, value, other in zip(names, outputs, expected, strict=True):
        if value.shape != other.shape:
            found = f"output {name!r} has the shape {[*value.shape]} in {where} and {[*other.shape]} in ONNX Runtime"
            raise ModelError(f"{found}; use --target onnxruntime")


def _outputs(
    load: Load, names: Sequence[str], where: str, reference: Reference
) -> tuple[list[list[Array]], onnx.ModelProto | None]:
    """Return the outputs of each batch, and the optimized graph if it is traced.

    Outputs that are large are in the scratch folder.
    """
    run, optimized = load()
    measurement = reference.measurement
    each, scratch = 4 * measurement.observation.metric.elements * len(reference.samples), measurement.scratch
    batches = reference.samples.batches(measurement.observation.batching.size)
    if scratch is None or each <= FLOAT_MEMORY:
        return [run(feeds, names) for feeds in batches], optimized
    key = "".join(c if c.isalnum() else "_" for c in where)
    outputs = [
        [scratch.moved(f"verify-{key}-{k}-{n}", value) for n, value in enumerate(run(feeds, names))]
        for k, feeds in enumerate(batches)
    ]
    return outputs, optimized
