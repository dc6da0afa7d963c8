"""The results of a run, collected into its report."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.float_constants import left_in_file
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.sizes import model_bytes
from rdoq_onnx.refinement.best import Step
from rdoq_onnx.refinement.diversion import Diverted, predicted_divergence
from rdoq_onnx.report.costs import CostReport
from rdoq_onnx.report.layer_report import LayerReport, TableReport
from rdoq_onnx.report.outputs import DivergenceReport, PartReport
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.wording import count_widths
from rdoq_onnx.verification.latency import Latency
from rdoq_onnx.verification.running import Running
from rdoq_onnx.verification.verify import Verification


@dataclass(frozen=True)
class Outcome:
    """The results of all steps of a run on the model `original`, read from `source`.

    seconds: of each step. diverted: what bits that were diverted towards the divergence gained. likeness: of the
    held-out samples to those seen; None if not known.
    """

    source: str
    original: onnx.ModelProto
    samples: Samples
    emission: Emission
    allocation: Allocation
    verification: Verification
    predicted_parts: tuple[float, ...]
    steps: tuple[Step, ...]
    seconds: Mapping[str, float]
    failure: VerificationError | None = None
    latency: tuple[Latency, ...] = ()
    diverted: Diverted | None = None
    likeness: float | None = None
    running: Running | None = None
    cost: CostReport | None = None


def _tables(layer: Layer, measurement: Measurement) -> tuple[TableReport, ...]:
    """Report on the tables that have the integers of `layer`: itself, or those tied to it."""
    tied = (tie.table for tie in measurement.network.ties if tie.layer == layer.name)
    tables = (x for x in (layer, *tied) if x.looked_up)
    return tuple(TableReport(x.name, x.linear.channels, measurement.seen.get(x.name)) for x in tables)


def make_report(outcome: Outcome) -> Report:
    """Collect the figures of a run."""
    emission, allocation, verification = outcome.emission, outcome.allocation, outcome.verification
    measurement = allocation.measurement
    network, channels = measurement.network, measurement.channels
    feeding = {
        f: bits for a, bits in zip(network.activations, allocation.activation_bits, strict=True) for f in a.feeds
    }
    blocks = {each.layer.name: each.block for each in measurement.layers}
    layers = tuple(
        LayerReport(
            x.name,
            x.linear.op_type,
            tuple(bits.tolist()),
            feeding.get(x.uses[0].data),
            _tables(x, measurement),
            blocks.get(x.name, 0),
            None if outcome.cost is None else sum(outcome.cost.nodes[u.node] for u in x.uses),
        )
        for x, bits in zip(network.searched, allocation.layer_bits, strict=True)
    )
    elements = measurement.curves.elements
    budgeted = [k for k, a in enumerate(network.activations) if not a.fusion]
    widths = allocation.bits[:channels]
    scales = 0 if measurement.curves.overhead is None else int(measurement.curves.overhead.sum())
    return Report(
        input=outcome.source,
        weight_bits=allocation.weight_average,
        activation_bits=allocation.activation_average,
        weight_elements=int(elements[:channels].sum()),
        payload_bits=allocation.weight_payload,
        scale_bits=scales,
        weight_histogram=count_widths(widths),
        activation_elements=int(elements[channels:][budgeted].sum()),
        activation_histogram=count_widths(np.array([allocation.activation_bits[k] for k in budgeted], np.int64)),
        fusion_tensors=tuple(a.tensor for a in network.activations if a.fusion),
        predicted=allocation.predicted,
        measured=verification.measured,
        sqnr_db=verification.sqnr_db,
        level_gap=verification.level_gap,
        optimality_gap=allocation.gap,
        kernels=verification.kernels,
        float_layers=verification.float_layers,
        storage=emission.storage,
        removed_channels=sum(map(len, emission.removed.values())),
        kept_channels=emission.kept,
        input_bytes=model_bytes(outcome.original),
        output_bytes=model_bytes(emission.model),
        seconds=dict(outcome.seconds),
        calibration=outcome.samples.source,
        samples=len(outcome.samples),
        supplied=outcome.samples.supplied,
        held_out=verification.samples,
        layers=layers,
        skipped=(*network.skipped, *left_in_file(emission.model, network, network.skipped)),
        probed=measurement.probed,
        by_layer=measurement.by_layer,
        steps=outcome.steps,
        parts=tuple(
            PartReport(part.name, part.output, predicted, part.measured, part.sqnr_db, part.bound_db)
            for part, predicted in zip(verification.parts, outcome.predicted_parts, strict=True)
        ),
        agreement=verification.agreement,
        latency=outcome.latency,
        divergence=_divergence(outcome),
        likeness=outcome.likeness,
        running=outcome.running,
        cost=outcome.cost,
        reason=None if outcome.failure is None else str(outcome.failure),
    )


def _divergence(outcome: Outcome) -> DivergenceReport | None:
    measured, allocation = outcome.verification.divergence, outcome.allocation
    if measured is None:
        return None
    minimized = allocation.measurement.observation.metric.name == "kl"
    return DivergenceReport(minimized, predicted_divergence(allocation), measured, outcome.diverted)
