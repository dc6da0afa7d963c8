"""The figures of a run, and their form as JSON and as text."""

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.refinement.best import Step
from rdoq_onnx.refinement.reference import Agreement
from rdoq_onnx.report.costs import CostReport
from rdoq_onnx.report.layer_report import LayerReport
from rdoq_onnx.report.outputs import DivergenceReport, PartReport
from rdoq_onnx.report.wording import decibels, histogram, human_bytes, kernel_words, latency_rows, percent, times
from rdoq_onnx.verification.latency import Latency
from rdoq_onnx.verification.running import Running
from rdoq_onnx.version import __version__

_SHOWN_PARTS = 6


@dataclass(frozen=True)
class Report:
    """The figures of a run. Average bits are per element; distortions are δ of Eq. 7; file sizes are in bytes."""

    input: str
    weight_bits: float
    activation_bits: float | None
    weight_elements: int
    payload_bits: int
    scale_bits: int  # of the payload, those of scales of blocks
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
    skipped: tuple[Skip, ...]
    probed: Mapping[str, str]
    by_layer: bool  # whether curves of weights are quadratic forms (curves/forms.py)
    steps: tuple[Step, ...] = ()
    latency: tuple[Latency, ...] = ()
    running: Running | None = None  # measured with --storage nbits
    advice: tuple[str, ...] = ()
    parts: tuple[PartReport, ...] = ()
    agreement: Agreement | None = None
    reason: str | None = None
    supplied: tuple[str, ...] = ()  # inputs that the samples left out
    divergence: DivergenceReport | None = None
    cost: CostReport | None = None
    likeness: float | None = None  # of the held-out samples to those seen (verification/likeness.py)

    def __repr__(self) -> str:
        return f"Report({self.headline})"

    @property
    def headline(self) -> str:
        """The figures of a run in a line."""
        activations = "float" if self.activation_bits is None else f"{self.activation_bits:.2f} bits"
        bits = f"weights {self.weight_bits:.2f} bits, activations {activations}"
        return f"{bits}, {self.sqnr_db:.2f} dB on {self.held_out} held-out samples, {self.output_bytes:,} bytes"

    @property
    def passed(self) -> bool:
        """Whether all gates passed; `reason` says why not."""
        return self.reason is None

    @property
    def metric(self) -> str:
        """What δ is: "mse", the squared error, or "kl", the divergence."""
        return "kl" if self.divergence is not None and self.divergence.minimized else "mse"

    def to_json(self, output: str = "") -> str:
        """Write the document of `--json`."""
        channels = sum(len(x.bits) for x in self.layers)
        document = {
            "version": __version__,
            "input": self.input,
            "output": output,
            "passed": self.passed,
            "reason": self.reason,
            "bits": {"weights": self.weight_bits, "activations": self.activation_bits},
            "weights": {
                "channels": channels,
                "elements": self.weight_elements,
                "payload_bytes": -(-self.payload_bits // 8),
                "scale_bytes": -(-self.scale_bits // 8),
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
                "sqnr_db": _finite(self.sqnr_db),
                "optimality_gap": self.optimality_gap,
                "metric": self.metric,
                "divergence": None if self.divergence is None else self.divergence.document(),
                "curves": "layer by layer" if self.by_layer else "sample by sample",
                "parts": [
                    asdict(part) | {"sqnr_db": _finite(part.sqnr_db), "bound_db": _finite(part.bound_db)}
                    for part in self.parts
                ],
            },
            "agreement": None if self.agreement is None else self.agreement.document(),
            "cost": None if self.cost is None else self.cost.document(),
            "file_bytes": {"input": self.input_bytes, "output": self.output_bytes},
            "seconds": {step: round(s, 3) for step, s in self.seconds.items()},
            "latency": [asdict(x) for x in self.latency],
            "running": None if self.running is None else asdict(self.running),
            "advice": list(self.advice),
            "calibration": {
                "source": self.calibration,
                "samples": self.samples,
                "likeness": self.likeness,
                "supplied": [*self.supplied],
            },
            "layers": [x.document() for x in self.layers],
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
            ("output SQNR", self._sqnr()),
            *self._part_rows(),
            *self._distortion(),
            (
                "file",
                f"{human_bytes(self.output_bytes)}, {percent(self.output_bytes / max(self.input_bytes, 1))} of "
                f"{human_bytes(self.input_bytes)}",
            ),
            ("weight data", f"{human_bytes(-(-self.payload_bits // 8))} at these widths, storage {self.storage}"),
        ]
        gap = "optimality gap", f"at most {percent(self.optimality_gap)} of the predicted distortion"
        speed = [("integer kernels", kernel_words(self.kernels)), *latency_rows(self.latency, self.running)]
        return [quality, self._widths(), [*map(_gain, self.steps), gap], [*speed, ("time", times(self.seconds))]]

    def _distortion(self) -> list[tuple[str, str]]:
        own = [("distortion", f"{self.measured:.4g} measured, {self.predicted:.4g} predicted")]
        return ([] if self.metric == "kl" else own) + ([] if self.divergence is None else self.divergence.rows())

    def _sqnr(self) -> str:
        where = f"{self.sqnr_db:.2f} dB on {self.held_out} held-out samples"
        return f"{where}, in the worst of {len(self.parts)} parts" if len(self.parts) > 1 else where

    def _part_rows(self) -> list[tuple[str, str]]:
        rows = []
        if len(self.parts) > 1:
            worst = sorted(self.parts, key=lambda part: part.sqnr_db)
            rows = [(f"  {part.name}", f"{part.sqnr_db:.2f} dB{part.place}") for part in worst[:_SHOWN_PARTS]]
            if len(worst) > _SHOWN_PARTS:
                rows.append(
                    ("  others", f"{len(worst) - _SHOWN_PARTS} parts of {worst[_SHOWN_PARTS].sqnr_db:.2f} dB or more")
                )
        if self.agreement is not None:
            rows += self.agreement.rows()
        return rows

    def _widths(self) -> list[tuple[str, str]]:
        rows = [] if self.cost is None else self.cost.rows()
        rows.append(("weights", f"{self.weight_bits:.3f} bits on average"))
        rows.append(("channels by bits", histogram(self.weight_histogram)))
        if self.scale_bits:
            rows.append(("scales of blocks", f"{self.scale_bits / self.weight_elements:.3f} of these bits"))
        if self.removed_channels or self.kept_channels:
            kept = sum(map(len, self.kept_channels.values()))
            rows.append(("0-bit channels", f"{self.removed_channels} removed, {kept} kept"))
        for table in (t for layer in self.layers for t in layer.tables):
            if table.seen is not None and table.seen < table.rows:
                seen = f"{table.seen:,} of {table.rows:,} rows seen in calibration"
                rows.append((f"  {table.name}", f"{seen}; the others by the mean effect of these"))
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


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
