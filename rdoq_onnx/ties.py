"""First-order curves tied to the truth at low widths, where perturbations are too large for a first order.

Two cheap exact measurements: a whole layer at one width is one run, and so is an activation under one quantizer. The
curves of a layer's channels at a width are scaled by the layer's exact δ over their sum (which holds what channels of
one layer do to each other, too); an activation's δ is replaced.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.measurement import Measurement
from rdoq_onnx.probe import Prober
from rdoq_onnx.progress import Advance, Unfinished

WEIGHT_BITS = 3  # the widest weights that are tied
_MOST = 8.0  # a measured ratio beyond this says more of the few samples than of the layer


def tie(
    measurement: Measurement, weights: Prober, activations: Prober, advance: Advance,
    unfinished: Unfinished | None = None,
) -> Measurement:  # fmt: skip
    """`measurement` with its curves tied to exact measurements: of weights, and of activations.

    unfinished: curves of which an earlier run has tied some.
    """
    unfinished = unfinished or Unfinished()
    tied = 0
    distortion = measurement.curves.distortion.copy()
    if (before := unfinished.get()) is not None:
        tied, distortion = before["tied"], before["distortion"].copy()
        advance(tied)

    def done() -> None:
        nonlocal tied
        tied += 1
        unfinished.put({"tied": tied, "distortion": distortion.copy()})
        advance(1)

    layers = list(zip(
        measurement.network.layers, measurement.unit_rows(), measurement.codes, measurement.means, strict=True
    ))  # fmt: skip
    for layer, rows, codes, mean in layers[tied:]:
        low = {b: c for b, c in codes.items() if b <= WEIGHT_BITS}
        if low and not any(u.output in measurement.probed for u in layer.uses):
            exact = weights.whole_layer(layer, list(low.values()), mean)
            for bits, value in zip(low, exact, strict=True):
                distortion[rows, bits] *= ratio(value, distortion[rows, bits])
        done()
    tables = zip(measurement.network.activations, measurement.quantizers, strict=True)
    untied = list(enumerate(tables, measurement.channels))[max(tied - len(layers), 0) :]
    for row, (activation, table) in untied:
        distortion[row, list(table)] = activations.activation(activation, list(table.values()))
        done()
    return replace(measurement, curves=replace(measurement.curves, distortion=distortion))


def runs(measurement: Measurement) -> int:
    """How many perturbations `tie` measures."""
    weights = sum(1 for codes in measurement.codes for b in codes if b <= WEIGHT_BITS)
    return weights + sum(len(table) for table in measurement.quantizers)


def ratio(exact: float, first_order: NDArray[np.float64]) -> float:
    """What a layer's curves are multiplied by."""
    total = float(first_order.sum())
    return float(np.clip(exact / total, 1 / _MOST, _MOST)) if total > 0 else 1.0
