"""Curves of weights that no product unfolds: forms in the rounding errors, as for large layers (forms.py).

a table's rows    δ_r ≈ s_r ΔW_rᵀ F ΔW_r / D    from the gradients of rows (candidates/table_rows.py)
all others        δ_r ≈ γ ‖ΔW_r‖²               γ from an exact run of the whole weight (missing_forms.py)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.candidates.blocks import Blocks, in_parts
from rdoq_onnx.candidates.candidates import FLOAT_LIMIT
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.candidates.table_rows import TableRows
from rdoq_onnx.curves.forms import Form
from rdoq_onnx.curves.layer_work import LayerWork, Rounded
from rdoq_onnx.curves.measurement import MeasuredLayer
from rdoq_onnx.curves.missing_forms import measured_gain, output_form
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.threads import Workers

Float = NDArray[np.float64]


@dataclass(frozen=True)
class StoredWeights:
    """What rounds and measures the stored weights of `network`.

    widths: those offered. rows: of the tables with gradients, by name. prober: for exact runs of all others.
    """

    network: Network
    widths: tuple[int, ...]
    rows: Mapping[str, TableRows]
    prober: Prober
    workers: Workers

    def measured(self, layer: Layer) -> tuple[MeasuredLayer, Float]:
        """Round `layer` at all widths; return its codes and its curves [units, widths]."""
        moments = self.moments(layer)
        work = LayerWork(layer, self.network.rows(layer), self._form(layer, moments), FLOAT_LIMIT, None)
        each = [self._rounded(work, moments, bits) for bits in self.widths]
        codes = dict(zip(self.widths, (r.codes for r in each), strict=True))
        return MeasuredLayer(layer, codes, moments.mean), np.stack([r.curves for r in each], axis=1)

    def moments(self, layer: Layer) -> Moments:
        """Return what stands for the moments of the input: nothing is known of it but the errors' second moment."""
        rows = self.rows.get(layer.name)
        return Moments(np.zeros((1, layer.linear.inputs)), _identity(layer) if rows is None else rows.rounding)

    def added(self, layer: Layer, codes: Mapping[int, WeightCodes]) -> Float:
        """Return what tables tied to `layer` add to its curves, [units, widths of `codes`]."""
        total = np.zeros((layer.linear.channels, len(codes)))
        weights, units = self.network.rows(layer), np.arange(layer.linear.channels)
        for tie in (t for t in self.network.ties if t.layer == layer.name and t.table.name in self.rows):
            form = table_form(tie.table, self.rows[tie.table.name])
            total += np.stack([form(c.change(weights), units) for c in codes.values()], axis=1)
        return total

    def _form(self, layer: Layer, moments: Moments) -> Form:
        if layer.name in self.rows:
            return table_form(layer, self.rows[layer.name])
        form = output_form(layer, moments, moments.covariance, 1.0)
        gain = measured_gain(
            LayerWork(layer, self.network.rows(layer), form, FLOAT_LIMIT, None), moments, self.widths, self.prober
        )
        return output_form(layer, moments, moments.covariance, gain)

    def _rounded(self, work: LayerWork, moments: Moments, bits: int) -> Rounded:
        """Round all rows to `bits` bits: to nearest, or under the second moment where that serves a row better."""
        parts, covariance = work.parts(work.all), moments.covariance
        nearest = Rounded.joined(self.workers.map(lambda units: work.nearest(units, covariance, (bits,))[0], parts))
        if work.layer.name not in self.rows or not bits:
            return nearest
        variants, scales = [nearest], nearest.codes.scales
        for compensator in (Compensator.of(*each) for each in moments.variants()):
            tried = self.workers.map(partial(_compensated, work, bits, scales, compensator), parts)
            variants.append(Rounded.joined(tried))
        return Rounded.best(variants, np.stack([v.curves for v in variants]).argmin(axis=0))


def _compensated(
    work: LayerWork, bits: int, scales: NDArray[np.float32], compensator: Compensator, units: NDArray[np.int64]
) -> Rounded:
    return work.compensated(units, bits, scales[units].astype(np.float64), compensator)


def stored_statistics(layer: Layer, rows: TableRows | None) -> dict[str, NDArray[Any]]:
    """Return what stands for the statistics of a stored weight of a large network, by kind (statistics.py).

    rows: of a table with gradients; the form of any other needs its gain.
    """
    known = {"mean": np.zeros((1, layer.linear.inputs)), "vectors": np.zeros(1)}
    if rows is None:
        return {**known, "covariance": _identity(layer), "basis": _identity(layer)}
    basis, powers, shares = form_arrays(rows)
    return {**known, "covariance": rows.rounding, "basis": basis, "powers": powers, "shares": shares}


def table_form(layer: Layer, rows: TableRows) -> Form:
    """Return the forms of a table's rows."""
    return Form(Blocks(layer.linear), *form_arrays(rows))


def form_arrays(rows: TableRows) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return basis, powers and shares of the forms (forms.py) of a table's rows."""
    basis, shares = rows.spectrum()
    powers = np.broadcast_to(rows.gains[None, :, None], (len(basis), len(rows.gains), 1))
    return basis.astype(np.float32), powers.astype(np.float32), shares.astype(np.float32)


def _identity(layer: Layer) -> Float:
    parts, width, _ = in_parts(np.empty((1, layer.linear.inputs, 1))).shape
    return np.broadcast_to(np.eye(width), (parts, width, width))
