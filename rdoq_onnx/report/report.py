"""What a run did, as figures, as JSON and as text."""

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
from rdoq_onnx.report.wording import decibels, histogram, human_bytes, kernel_words, times
from rdoq_onnx.verification.verify import Verification
from rdoq_onnx.version import __version__


@dataclass(frozen=True)
class LayerReport:
    """One layer: its channels' widths, in order, and that of the activation that feeds it (None: float)."""

    name: str
    op: str
    bits: tuple[int, ...]
    activation_bits: int | None

    @property
    def mean_bits(self) -> float:
        return sum(self.bits) / len(self.bits)


@dataclass(frozen=True)
class WeightOnlyReport:
    """Weights quantized outside the search and the budgets: the first node that applies them, their name, and why."""

    name: str
    op: str
    weight: str
    elements: int
    bits: int
    reason: str


@dataclass(frozen=True)
class Report:
    """Figures of a run. Averages of bits are over elements; distortions are δ of Eq. 7; files are in bytes."""

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

    def to_json(self, output: str = "") -> str:
        """The document of `--json`."""
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
        """The summary as an HTML table."""
        rows = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self.rows())
        return f"<table><caption>{html.escape(self.input)}</caption>{rows}</table>"

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (figure, value) lines."""
        activations = "float" if self.activation_bits is None else f"{self.activation_bits:.3f} bits on average"
        weights = f"{self.weight_bits:.3f} bits on average, {histogram(self.weight_histogram)}"
        lines = [
            ("weights", weights if self.layers else "none that the search reaches"),
            ("activations", f"{activations}{', ' if self.activation_histogram else ''}"
                            f"{histogram(self.activation_histogram)}"),
            ("output SQNR", f"{self.sqnr_db:.2f} dB on {self.held_out} held-out samples"),
            ("distortion", f"{self.measured:.4g} measured, {self.predicted:.4g} predicted"),
            ("optimality gap", f"{100 * self.optimality_gap:.3g} % of the predicted distortion at most"),
            ("file", f"{human_bytes(self.output_bytes)} from {human_bytes(self.input_bytes)}"),
            ("stored weights", f"{self.storage}; {human_bytes(-(-self.payload_bits // 8))} at their nominal bits"),
            ("integer kernels", kernel_words(self.kernels)),
            ("time", times(self.seconds)),
        ]  # fmt: skip
        for step in self.steps:
            if step.name == "uniform":
                worse = f"{decibels(step.tried, step.after)} worse, same quantizer and budget"
                lines.insert(3, ("uniform widths", worse))
            else:
                lines.insert(3, (step.name, f"{decibels(step.before, step.after)} gained"))
        if self.removed_channels or self.kept_channels:
            kept = sum(map(len, self.kept_channels.values()))
            lines.append(("channels of 0 bits", f"{self.removed_channels} removed, {kept} kept"))
        if self.fusion_tensors:
            lines.insert(2, ("8 bits for fusion", f"{len(self.fusion_tensors)} tensors between integer kernels"))
        if self.weight_only:
            elements = sum(x.elements for x in self.weight_only)
            widths = histogram(_count(np.array([x.bits for x in self.weight_only])))
            told = f"{len(self.weight_only)} tensors, {elements:,} weights, {widths}"
            lines.insert(1, ("weights not searched", told))
        return lines


@dataclass(frozen=True)
class Outcome:
    """A run: the model `original`, read from `source`, and what each step made of it. seconds: of each step."""

    source: str
    original: onnx.ModelProto
    samples: Samples
    emission: Emission
    allocation: Allocation
    verification: Verification
    steps: tuple[Step, ...]
    seconds: Mapping[str, float]


def make_report(outcome: Outcome) -> Report:
    """Gather the figures of a run."""
    emission, allocation, verification = outcome.emission, outcome.allocation, outcome.verification
    measurement = allocation.measurement
    network, channels = measurement.network, measurement.channels
    feeding = {
        f: bits
        for a, bits in zip(network.activations, allocation.activation_bits, strict=True)
        for f in a.feeds
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


