"""The figures of a run, and their form as JSON and as text."""

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.model.sizes import model_bytes
from rdoq_onnx.refinement.refine import Step
from rdoq_onnx.report.wording import decibels, histogram, human_bytes, kernel_words, latency_rows, percent, times
from rdoq_onnx.verification.latency import Latency
from rdoq_onnx.verification.verify import Verification
from rdoq_onnx.version import __version__


@dataclass(frozen=True)
class LayerReport:
    """A layer: the widths of its channels, in order, and of its input activation (None: float)."""

    name: str
    op: str
    bits: tuple[int, ...]
    activation_bits: int | None

    @property
    def mean_bits(self) -> float:
        return sum(self.bits) / len(self.bits)


@dataclass(frozen=True)
class WeightOnlyReport:
    """Weights quantized outside the search and the budgets: the first node that reads them, their name, the reason."""

    name: str
    op: str
    weight: str
    elements: int
    bits: int
    reason: str


@dataclass(frozen=True)
class Report:
    """The figures of a run. Average bits are per element; distortions are δ of Eq. 7; file sizes are in bytes."""

    input: str
    weight_bits: float
    activation_bits: float | None
    weight_elements: int
    payload_bits: int
    weight_histogram: Mapping[int, int]
    activation_elements: int
    activation_histogram: Mapping[int, int]
    fusion_tensors: tuple[str, ...]
    predicted: float
    measured: float
    sqnr_db: float
    level_gap: float
    optimality_gap: float
    kernels: Mapping[str, int]
    float_layers: Mapping[str, str]
    storage: str
    removed_channels: int
    kept_channels: Mapping[str, tuple[tuple[int, str], ...]]
    input_bytes: int
    output_bytes: int
    seconds: Mapping[str, float]
    calibration: str
    samples: int
    held_out: int
    layers: tuple[LayerReport, ...]
    weight_only: tuple[WeightOnlyReport, ...]
    skipped: tuple[Skip, ...]
    probed: Mapping[str, str]
    steps: tuple[Step, ...] = ()
    latency: tuple[Latency, ...] = ()
    unsearched: float = 0.0  # δ of the weights outside the search alone
    advice: tuple[str, ...] = ()

    def to_json(self, output: str = "") -> str:
        """Write the document of `--json`."""
        channels = sum(len(x.bits) for x in self.layers)
        document = {
            "version": __version__,
            "input": self.input,
            "output": output,
            "bits": {"weights": self.weight_bits if self.layers else None, "activations": self.activation_bits},
            "weights": {
                "channels": channels,
                "elements": self.weight_elements,
                "payload_bytes": -(-self.payload_bits // 8),
                "histogram": {str(b): n for b, n in self.weight_histogram.items()},
            },
            "activations": {
                "tensors": sum(self.activation_histogram.values()),
                "elements": self.activation_elements,
                "histogram": {str(b): n for b, n in self.activation_histogram.items()},
            },
            "distortion": {
                "predicted": self.predicted,
                "measured": self.measured,
                "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,  # JSON has no infinity
                "optimality_gap": self.optimality_gap,
            },
            "file_bytes": {"input": self.input_bytes, "output": self.output_bytes},
            "seconds": {step: round(s, 3) for step, s in self.seconds.items()},
            "latency": [asdict(x) for x in self.latency],
            "advice": list(self.advice),
            "calibration": {"source": self.calibration, "samples": self.samples},
            "layers": [
                {
                    "name": x.name,
                    "op": x.op,
                    "channels": len(x.bits),
                    "bits": list(x.bits),
                    "activation_bits": x.activation_bits,
                }
                for x in self.layers
            ],
            "weight_only": [asdict(x) for x in self.weight_only],
            "skipped": [{"node": s.node, "reason": s.reason} for s in self.skipped],
        }
        return json.dumps(document, indent=2) + "\n"

    def to_html(self) -> str:
        """Write the summary as an HTML table."""
        rows = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self.rows())
        return f"<table><caption>{html.escape(self.input)}</caption>{rows}</table>"

    def rows(self) -> list[tuple[str, str]]:
        """Word the summary as (figure, value) rows."""
        return [row for section in self.sections() for row in section]

    def sections(self) -> list[list[tuple[str, str]]]:
        """Group the rows of the summary: quality and size, widths, gains, how it runs."""
        quality = [
            ("output SQNR", f"{self.sqnr_db:.2f} dB on {self.held_out} held-out samples"),
            ("distortion", f"{self.measured:.4g} measured, {self.predicted:.4g} predicted"),
            (
                "file",
                f"{human_bytes(self.output_bytes)}, {percent(self.output_bytes / max(self.input_bytes, 1))} of "
                f"{human_bytes(self.input_bytes)}",
            ),
            ("weight data", f"{human_bytes(-(-self.payload_bits // 8))} at these widths, storage {self.storage}"),
        ]
        gap = "optimality gap", f"at most {percent(self.optimality_gap)} of the predicted distortion"
        speed = [("integer kernels", kernel_words(self.kernels)), *latency_rows(self.latency)]
        return [quality, self._widths(), [*map(_gain, self.steps), gap], [*speed, ("time", times(self.seconds))]]

    def _widths(self) -> list[tuple[str, str]]:
        rows = [("weights", f"{self.weight_bits:.3f} bits on average" if self.layers else "none in the search")]
        if self.layers:
            rows.append(("channels by bits", histogram(self.weight_histogram)))
        if self.removed_channels or self.kept_channels:
            kept = sum(map(len, self.kept_channels.values()))
            rows.append(("0-bit channels", f"{self.removed_channels} removed, {kept} kept"))
        if self.weight_only:
            elements = sum(x.elements for x in self.weight_only)
            rows.append(("weights outside the budget", f"{elements:,} in {len(self.weight_only)} tensors"))
            rows.append(("their tensors by bits", histogram(_count(np.array([x.bits for x in self.weight_only])))))
        if self.activation_bits is None:
            return [*rows, ("activations", "float")]
        rows.append(("activations", f"{self.activation_bits:.3f} bits on average"))
        rows.append(("activations by bits", histogram(self.activation_histogram)))
        if self.fusion_tensors:
            rows.append(("extra 8-bit tensors", f"{len(self.fusion_tensors)}, outside the budget"))
        return rows


def _gain(step: Step) -> tuple[str, str]:
    """Word the gain of a refinement step as a row of the summary."""
    if step.name == "uniform":
        return "gain over one width everywhere", f"{decibels(step.tried, step.after)} at the same budget"
    return f"gain from {step.name}", decibels(step.before, step.after)


@dataclass(frozen=True)
class Outcome:
    """The results of all steps of a run on the model `original`, read from `source`. seconds: of each step."""

    source: str
    original: onnx.ModelProto
    samples: Samples
    emission: Emission
    allocation: Allocation
    verification: Verification
    steps: tuple[Step, ...]
    seconds: Mapping[str, float]


def make_report(outcome: Outcome) -> Report:
    """Collect the figures of a run."""
    emission, allocation, verification = outcome.emission, outcome.allocation, outcome.verification
    measurement = allocation.measurement
    network, channels = measurement.network, measurement.channels
    feeding = {
        f: bits for a, bits in zip(network.activations, allocation.activation_bits, strict=True) for f in a.feeds
    }
    layers = tuple(
        LayerReport(x.name, x.linear.op_type, tuple(bits.tolist()), feeding.get(x.uses[0].data))
        for x, bits in zip(network.layers, allocation.layer_bits, strict=True)
    )
    elements = measurement.curves.elements
    budgeted = [k for k, a in enumerate(network.activations) if not a.fusion]
    spent = allocation.bits[:channels]
    return Report(
        input=outcome.source,
        weight_bits=allocation.weight_average,
        activation_bits=allocation.activation_average,
        weight_elements=int(elements[:channels].sum()),
        payload_bits=int((spent * elements[:channels]).sum()),
        weight_histogram=_count(spent),
        activation_elements=int(elements[channels:][budgeted].sum()),
        activation_histogram=_count(np.array([allocation.activation_bits[k] for k in budgeted], np.int64)),
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
        held_out=verification.samples,
        layers=layers,
        weight_only=tuple(
            WeightOnlyReport(w.name, w.op_type, w.tensor, w.elements, bits, w.reason)
            for w, bits in zip(network.weight_only, allocation.weight_only_bits, strict=True)
        ),
        skipped=network.skipped,
        probed=measurement.probed,
        steps=outcome.steps,
    )


def _count(bits: NDArray[np.int64]) -> dict[int, int]:
    widths, counts = np.unique(bits, return_counts=True)
    return {int(w): int(n) for w, n in zip(widths, counts, strict=True)}
