"""A layer in the report of a run."""

from dataclasses import asdict, dataclass
from typing import Any

from rdoq_onnx.report.wording import finite


@dataclass(frozen=True)
class TableReport:
    """A table: its rows, and how many of them the samples look up; None where that was not measured."""

    name: str
    rows: int
    seen: int | None


@dataclass(frozen=True)
class LayerReport:
    """A layer: the widths of its channels, in order, and of its input activation (None: float).

    tables: itself, if it is a table, or those that have its integers.
    """

    name: str
    op: str
    bits: tuple[int, ...]
    activation_bits: int | None
    tables: tuple[TableReport, ...] = ()
    block_size: int = 0  # weights of a channel that share a scale; 0 for all of them
    cost: float | None = None  # of all its nodes, in the unit of the report's `cost`
    sqnr_db: float | None = None  # of its output; None where the emitted model has no such tensor

    @property
    def mean_bits(self) -> float:
        return sum(self.bits) / len(self.bits)

    def document(self) -> dict[str, Any]:
        """Return its item of `layers` in the document of `--json`."""
        return {
            "name": self.name,
            "op": self.op,
            "channels": len(self.bits),
            "bits": list(self.bits),
            "activation_bits": self.activation_bits,
            "tables": [asdict(t) for t in self.tables],
            "block_size": self.block_size,
            "cost": self.cost,
            "sqnr_db": finite(self.sqnr_db),
        }
