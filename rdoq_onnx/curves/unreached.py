"""Curves of stored weights that no sample reaches, such as those of a branch of an If that never runs.

Nothing is known of their effect, which is not to say that they have none. It is taken to be the mean effect of all
others, by squared error relative to the squared weights:

    δ_r = γ ‖ΔW_r‖² / ‖W‖²,    γ = the mean over the other weights of δ / (‖ΔW‖² / ‖W‖²)
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.curves.measurement import MeasuredLayer, Measurement
from rdoq_onnx.curves.shrinkage import squared_errors

Float = NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)
REASON = "no sample reaches it: its effect is taken to be the mean of the others'"


def with_unreached(measurement: Measurement) -> Measurement:
    """Give the stored weights of `measurement` that have no effect on any sample that of the others."""
    distortion, stored = measurement.curves.distortion, measurement.network.stored
    pairs = list(zip(measurement.layers, measurement.unit_rows(), strict=True))
    silent = [(each, rows) for each, rows in pairs[len(pairs) - len(stored) :] if not distortion[rows].any()]
    if not silent:
        return measurement
    gains = [_gain(measurement, each, distortion[rows]) for each, rows in pairs if distortion[rows].any()]
    gain = float(np.mean(gains)) if gains else measurement.observation.metric.power
    changed, probed = distortion.copy(), dict(measurement.probed)
    for each, rows in silent:
        changed[rows, list(each.codes)] = gain * _relative_errors(measurement, each)
        probed[each.layer.name] = REASON
    return replace(measurement, curves=replace(measurement.curves, distortion=changed), probed=probed)


def _gain(measurement: Measurement, each: MeasuredLayer, curves: Float) -> float:
    """Return δ over the relative squared error, at the narrowest width: no rounding is exact there."""
    column = min(each.codes)
    return float(curves[:, column].sum() / max(_relative_errors(measurement, each)[:, 0].sum(), _TINY))


def _relative_errors(measurement: Measurement, each: MeasuredLayer) -> Float:
    """Return ‖ΔW_r‖² / ‖W‖² of each channel and width, [units, widths]."""
    rows = measurement.network.rows(each.layer)
    power = float(np.square(rows, dtype=np.float64).sum())
    return squared_errors(list(each.codes.values()), rows) / max(power, _TINY)
