"""Round the channels of one large layer and tell what that does to the output, a part of them at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.candidates.layer_rows import LayerRows
from rdoq_onnx.curves.forms import Form, Forms
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.model.layers import Layer

Float = NDArray[np.float64]
Units = NDArray[np.int64]

_TOGETHER = 1 << 21  # weights that one task rounds


@dataclass(frozen=True)
class Rounded:
    """Codes of some units at one width, with δ and ‖ΔW‖² of each unit."""

    codes: WeightCodes
    curves: Float
    errors: Float

    @classmethod
    def joined(cls, parts: Sequence["Rounded"]) -> "Rounded":
        """Join the units of all `parts`."""
        integers, scales = (np.concatenate([getattr(p.codes, n) for p in parts]) for n in ("integers", "scales"))
        return cls(
            WeightCodes(integers, scales),
            np.concatenate([p.curves for p in parts]),
            np.concatenate([p.errors for p in parts]),
        )

    @classmethod
    def best(cls, variants: Sequence["Rounded"], best: Units) -> "Rounded":
        """Take each unit from its `best` variant."""
        result = variants[0]
        for k, other in enumerate(variants[1:], 1):
            units = best == k
            codes = result.codes.replaced(other.codes, units)
            pairs = ((result.curves, other.curves), (result.errors, other.errors))
            result = cls(codes, *(np.where(units, theirs, mine) for mine, theirs in pairs))
        return result

    def taken(self, units: Units) -> "Rounded":
        """Return these `units` alone."""
        return Rounded(self.codes.taken(units), self.curves[units], self.errors[units])


@dataclass(frozen=True)
class LayerWork:
    """A layer with its float rows [units, K], its forms, the limit of its integers and the floors of its scales.

    block: how many weights share a scale, see `Layer.blocks`.
    """

    layer: Layer
    rows: NDArray[np.float32]
    form: Form | Forms
    limit: int
    floors: Float | None
    block: int = 0

    @property
    def all(self) -> Units:
        return np.arange(len(self.rows))

    def parts(self, units: Units) -> list[Units]:
        """Divide `units` into tasks. The units of several groups stay together, all of them."""
        if not Blocks(self.layer.linear).single:
            return [self.all]
        tasks = -(-len(units) * self.rows.shape[1] // _TOGETHER)
        return np.array_split(units, max(1, min(tasks, len(units))))

    def nearest(self, units: Units, covariance: Float, widths: tuple[int, ...]) -> list[Rounded]:
        """Round `units` to nearest at each of the `widths`."""
        rows = self._rows(units)
        return [self._rounded(rows, codes, units) for codes in rows.starts(covariance, widths).values()]

    def compensated(self, units: Units, bits: int, scales: NDArray[np.float32], compensator: Compensator) -> Rounded:
        """Round `units` to `bits` bits with error compensation, at scales around `scales`, as in WeightCodes."""
        rows = self._rows(units)
        start = WeightCodes(np.empty((0, 0), np.int8), scales)
        return self._rounded(rows, rows.rounded(compensator, {bits: start})[bits], units)

    def _rows(self, units: Units) -> LayerRows:
        floors = None if self.floors is None else self.floors[units]
        return LayerRows(Blocks(self.layer.linear), self.rows[units], self.limit, floors, self.block)

    def _rounded(self, rows: LayerRows, codes: WeightCodes, units: Units) -> Rounded:
        change = codes.change(rows.rows)
        errors = np.einsum("uk,uk->u", change, change).astype(np.float64)
        return Rounded(codes, self.form(change, units), errors)
