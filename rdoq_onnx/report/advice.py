"""What to try next when a result is poor, reckoned from the curves: no run is made for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.allocation.frontier import with_budget
from rdoq_onnx.analysis.patterns import as_pattern
from rdoq_onnx.config import MAX_BITS, Config, Side
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.wording import pin_of

POOR_DB = 15.0  # output SQNR under which there is something to say
_OFF = 2.5  # measured over predicted distortion from which the curves are to blame
_LARGE = 0.2  # share of the distortion from which one layer or activation is worth a pin
_DEAR = 0.1  # share of more bits from which a pin is not
_LESS = 0.25  # of the distortion that a pin should leave of what it was


@dataclass(frozen=True)
class _Unit:
    """A layer or an activation: its rows of the curves, and the budget that it spends."""

    kind: str
    name: str
    rows: NDArray[np.int64]
    side: Side


def advise(allocation: Allocation, config: Config, report: Report) -> tuple[str, ...]:
    """Lines that say what to try next; none where the result is good."""
    poor = report.sqnr_db < POOR_DB
    off = report.measured > _OFF * allocation.predicted > 0
    lines = []
    if (poor or off) and report.calibration == "synthetic":
        lines.append("the samples are synthetic: give real ones with --calibration")
    if off:
        mend = "--measure probe" if config.effort == "best" else "--effort best"
        found = f"measured distortion is {report.measured / allocation.predicted:.1f} times the predicted one"
        lines.append(f"{found}: more --samples ({report.samples} now) or {mend} make curves that hold")
    if poor:
        lines += _pin(allocation, config) or _more_bits(allocation, config)
    return tuple(lines)


def _pin(allocation: Allocation, config: Config) -> list[str]:
    """The layer or activation that takes most, wider than it is, where that is cheap."""
    units = _units(allocation, config)
    taken, bits = allocation.distortions, allocation.bits
    curves, total = allocation.measurement.curves, allocation.predicted
    worst = max(units, key=lambda u: float(taken[u.rows].sum()), default=None)
    if worst is None or (own := float(taken[worst.rows].sum())) < _LARGE * total:
        return []
    offered = np.isfinite(curves.distortion[worst.rows]).all(axis=0)
    wider = [b for b in np.flatnonzero(offered).tolist() if b > bits[worst.rows].min()]
    left = {b: float(curves.distortion[worst.rows, b].sum()) for b in wider}
    width = next((b for b in wider if left[b] <= _LESS * own), wider[-1] if wider else None)
    if width is None or left[width] >= own:
        return []
    spent = bits * curves.elements
    rows = _rows_of(worst.side, allocation)
    extra = int(((width - bits[worst.rows]) * curves.elements[worst.rows]).sum())
    share = extra / float(spent[rows].sum())
    if not 0 < share <= _DEAR:
        return []
    now = config.activation_bits if worst.side == "activations" else _weight_bits(allocation, config)
    budget = max(_up((int(spent[rows].sum()) + extra) / int(curves.elements[rows].sum())), now or 0.0)
    trial = with_budget(replace(config, pins=(*config.pins, (as_pattern(worst.name), width))), worst.side, budget)
    found = _predicted(allocation, trial)
    if found is None or found >= total:
        return []
    told = f"{worst.kind} {worst.name} takes {100 * own / total:.0f} % of the distortion"
    option = f"{pin_of(worst.name, width)} {_budget_option(worst.side, budget)}"
    return [f"{told}: {option} costs {100 * share:.1f} % more bits and leaves {100 * found / total:.0f} % of it"]


def _more_bits(allocation: Allocation, config: Config) -> list[str]:
    """One bit more for the side that takes more."""
    taken, total = allocation.distortions, allocation.predicted
    sides: Sequence[Side] = ("weights", "activations")
    if config.joint or config.activation_bits is None:
        sides = ("both",) if config.joint else ("weights",)
    side = max(sides, key=lambda s: float(taken[_rows_of(s, allocation)].sum()))
    now = config.activation_bits if side == "activations" else _weight_bits(allocation, config)
    if now is None or now >= MAX_BITS or total <= 0:
        return []
    budget = min(now + 1, MAX_BITS)
    found = _predicted(allocation, with_budget(config, side, budget))
    if found is None or found >= total:
        return []
    who = "weights and activations take" if side == "both" else f"{side} take"
    share = 100 * float(taken[_rows_of(side, allocation)].sum()) / total
    return [f"{who} {share:.0f} % of the distortion: {_budget_option(side, budget)} leaves {100 * found / total:.0f} %"]


def _weight_bits(allocation: Allocation, config: Config) -> float:
    return config.weight_bits if config.size is None else _up(allocation.weight_average)


def _units(allocation: Allocation, config: Config) -> list[_Unit]:
    """What a pin may widen: all but fusion tensors."""
    measurement = allocation.measurement
    layers = [
        _Unit("layer", layer.name, np.arange(rows.start, rows.stop), "both" if config.joint else "weights")
        for layer, rows in zip(measurement.network.layers, measurement.unit_rows(), strict=True)
    ]
    activations = [
        _Unit("activation", a.tensor, np.array([measurement.channels + k]), "both" if config.joint else "activations")
        for k, a in enumerate(measurement.network.activations) if not a.fusion
    ]  # fmt: skip
    return [*layers, *activations]


def _rows_of(side: Side, allocation: Allocation) -> NDArray[np.int64]:
    """The rows of the curves that spend the budget of `side`."""
    measurement = allocation.measurement
    weights = np.arange(measurement.channels)
    feeding = np.array([k for k, a in enumerate(measurement.network.activations) if not a.fusion], np.int64)
    parts = {"weights": [weights], "activations": [weights[:0], measurement.channels + feeding]}
    return np.concatenate(parts.get(side, [weights, measurement.channels + feeding]))


def _budget_option(side: Side, bits: float) -> str:
    return f"--{'bits' if side == 'both' else 'weight-bits' if side == 'weights' else 'activation-bits'} {bits:g}"


def _predicted(allocation: Allocation, config: Config) -> float | None:
    try:
        return allocate_bits(allocation.measurement, config.budgets).predicted
    except RdoqError:
        return None


def _up(bits: float) -> float:
    return min(math.ceil(bits * 100 - 1e-9) / 100, float(MAX_BITS))
