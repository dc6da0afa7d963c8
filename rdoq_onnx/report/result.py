"""The result of a run: the emitted model, its report and its allocation."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.report.report import Report
from rdoq_onnx.system import io
from rdoq_onnx.verification.details import Details


@dataclass(frozen=True)
class Result:
    """A quantized model, with the figures, widths and settings behind it.

    model: the emitted ONNX. report: its figures. allocation: the width of every channel and activation, and through
    `allocation.measurement` the curves. config: the settings. details: what the HTML report shows beside these, if
    requested.
    """

    model: onnx.ModelProto
    report: Report
    allocation: Allocation
    config: Config
    details: Details | None = None
    failure: VerificationError | None = None

    def __repr__(self) -> str:
        return f"Result({self.report.headline})"

    @property
    def curves(self) -> Measurement:
        """Return the measurement: the curves, and the candidates they describe."""
        return self.allocation.measurement

    def save(self, path: str | Path) -> None:
        """Write the model atomically. Raises OutputError."""
        io.write_model(self.model, path)

    def _repr_html_(self) -> str:
        """Show the report's table in notebooks."""
        return self.report.to_html()
