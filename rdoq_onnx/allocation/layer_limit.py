"""Keep each layer within an on-chip buffer: its weights, and on request its input and output, at their widths.

    Σ_j bits(w_j) [+ elements(x) · a(x) + elements(z) · a(z)]  <=  limit    (one sample; 32 bits of what is in float)

The paper's own constraint. A layer over the limit is fixed at its best widths within it, alone; the activations may
then become narrower, but not wider. What it gives up goes to other layers, which may exceed the limit in turn: the
slope of the Lagrangian only falls, so a layer once over the limit stays at it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocate import solve
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.config import MAX_BITS, Budgets
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError
from rdoq_onnx.model.cost_rows import FLOAT
from rdoq_onnx.model.graph import Graph, after_clamps

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _OnChip:
    """What a layer's buffer holds: rows of the curves with their elements, and bits that no width changes."""

    name: str
    rows: Integers
    elements: Integers
    fixed: int

    def points(self, curves: Curves) -> Curves:
        return replace(curves.take(self.rows), elements=self.elements)


def within_limit(
    measurement: Measurement, budgets: Budgets, curves: Curves, weighed: Curves, choice: Integers
) -> Curves | None:
    """Fix layers that exceed the limit under `choice` to their best widths within it; None if no layer does.

    Raises BudgetError if a layer's narrowest widths exceed it.
    """
    limit = budgets.layer_limit
    if limit is None:
        return None
    units, widths = curves.distortion.shape
    mask, columns = np.ones((units, widths), bool), np.arange(widths)
    for layer in _buffers(measurement, budgets.layer_limit_activations):
        points = layer.points(curves)
        if points.spent(choice[layer.rows]).sum() + layer.fixed <= 8 * limit:
            continue
        try:
            within = solve(layer.points(weighed), max(8 * limit - layer.fixed, 0)).choice
        except BudgetError as error:
            raise BudgetError(
                f"--layer-limit {limit} cannot be met: the narrowest allowed widths of layer {layer.name!r} take "
                f"{least_bytes(points) + -(-layer.fixed // 8)} bytes; give that much or allow narrower widths"
            ) from error
        weights = layer.rows < measurement.channels
        mask[layer.rows[weights]] = columns == within[weights, None]
        mask[layer.rows[~weights]] &= columns <= within[~weights, None]
    return None if mask.all() else curves.restrict(mask)


def least_bytes(curves: Curves) -> int:
    """Return the bytes that the narrowest allowed widths take."""
    narrowest = np.isfinite(curves.distortion).argmax(axis=1)
    return -(-int(curves.spent(curves.widths[narrowest]).sum()) // 8)


def _buffers(measurement: Measurement, activations: bool) -> Iterator[_OnChip]:
    """List what each layer's buffer holds; with activations, once for each node that applies the layer."""
    network, elements = measurement.network, measurement.curves.elements
    targets = _quantized(network) if activations else {}
    graph = Graph(network.model) if activations else None
    for layer, rows in zip(network.layers, measurement.unit_rows(), strict=False):
        own = np.arange(rows.start, rows.stop)
        if graph is None:
            yield _OnChip(layer.name, own, elements[own], 0)
            continue
        for use in layer.uses:
            held = [(use.data, use.data), (after_clamps(use.output, graph), use.output)]
            sizes: dict[int, int] = {}
            fixed = 0
            for tensor, sized in held:
                size, k = measurement.observation.sizes[sized], targets.get(tensor)
                if k is None:
                    fixed += FLOAT * size
                elif network.activations[k].fusion:
                    fixed += MAX_BITS * size
                elif size:
                    sizes[measurement.channels + k] = sizes.get(measurement.channels + k, 0) + size
            yield _OnChip(
                layer.name,
                np.concatenate([own, np.array([*sizes], np.int64)]),
                np.concatenate([elements[own], np.array([*sizes.values()], np.int64)]),
                fixed,
            )


def _quantized(network: Network) -> dict[str, int]:
    """Return the index of the activation that a tensor is quantized as, under each of its names."""
    result: dict[str, int] = {}
    for k, each in enumerate(network.activations):
        for tensor in (*each.names, *each.feeds):
            result.setdefault(tensor, k)
    return result
