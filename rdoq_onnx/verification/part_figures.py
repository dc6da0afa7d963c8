"""What the outputs of a quantized model are off by, one part of them at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

from rdoq_onnx.observation.part_values import PartPowers
from rdoq_onnx.observation.parts import Part


@dataclass(frozen=True)
class PartFigures:
    """One part of the outputs: its SQNR in dB, and the one-sided 95 % lower bound of that."""

    name: str
    output: str
    sqnr_db: float
    bound_db: float


@dataclass(frozen=True)
class Parts:
    """Base of figures that consist of `parts`."""

    parts: tuple[PartFigures, ...]

    @property
    def worst(self) -> PartFigures:
        """The part with the lowest SQNR."""
        return min(self.parts, key=lambda part: part.sqnr_db)

    @property
    def sqnr_db(self) -> float:
        """The SQNR of the worst part."""
        return self.worst.sqnr_db


def part_figures(parts: Iterable[Part], powers: PartPowers) -> tuple[PartFigures, ...]:
    """Return the figures of `parts`, whose powers are the columns of `powers`."""
    columns = zip(parts, powers.sqnr_db, powers.bounds_db, strict=True)
    return tuple(PartFigures(part.name, part.output, sqnr, bound) for part, sqnr, bound in columns)
