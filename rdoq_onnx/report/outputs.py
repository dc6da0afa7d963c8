"""What the report says of the outputs: their parts, and the divergence of rows of logits."""

from dataclasses import asdict, dataclass
from typing import Any

from rdoq_onnx.refinement.diversion import Diverted


@dataclass(frozen=True)
class PartReport:
    """A part of the outputs: what it adds to the predicted and to the measured δ, its SQNR and the bound of that."""

    name: str
    output: str
    predicted: float
    measured: float
    sqnr_db: float
    bound_db: float

    @property
    def place(self) -> str:
        return "" if self.name == self.output else f", in {self.output}"


@dataclass(frozen=True)
class DivergenceReport:
    """The mean divergence KL(p||p~) of rows of logits, in nats a row.

    minimized: whether the curves are of it. predicted: None without curves of it. diverted: what bits diverted towards
    it gained on the judging samples.
    """

    minimized: bool
    predicted: float | None
    measured: float
    diverted: Diverted | None

    def rows(self) -> list[tuple[str, str]]:
        """Word the figures as (figure, value) rows."""
        predicted = "" if self.predicted is None else f", {self.predicted:.4g} predicted"
        rows = [("divergence of the logits", f"{self.measured:.4g} nats a row measured{predicted}")]
        if self.diverted is not None:
            gained = self.diverted
            fall = f"{gained.before:.4g} -> {gained.after:.4g} nats a row, for {gained.cost_db:.2f} dB"
            rows.append(("bits moved for it", fall))
        return rows

    def document(self) -> dict[str, Any]:
        """The figures for JSON."""
        moved = None if self.diverted is None else asdict(self.diverted)
        return {"unit": "nats a row", "predicted": self.predicted, "measured": self.measured, "diverted": moved}
