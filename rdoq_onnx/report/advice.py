"""Suggest what to try when a result is poor, computed from the curves without another run."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.allocation.frontier import with_budget
from rdoq_onnx.analysis.patterns import as_pattern, pins
from rdoq_onnx.config import MAX_BITS, Config, Side
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.report import causes
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.speed import speed_hints
from rdoq_onnx.report.wording import pin_of

POOR_DB = 15.0  # output SQNR below which a result is poor
_OFF = 3.0  # ratio of measured to predicted distortion, either way, beyond which curves are inaccurate
_LARGE = 0.2  # minimum share of the distortion for a layer or activation to be worth a pin
_EXPENSIVE = 0.1  # maximum relative increase in bits for a pin
_TARGET = 0.25  # share of its distortion that a pinned unit should keep at most


def advised(report: Report, allocation: Allocation, config: Config) -> Report:
    """Return `report` with the hints for it."""
    return replace(report, advice=advise(allocation, config, report))


def advise(allocation: Allocation, config: Config, report: Report) -> tuple[str, ...]:
    """Return hints on what to try next, one line each; none if the result is good."""
    poor = report.sqnr_db < POOR_DB
    doubtful = poor or _is_off(allocation, report)
    lines = [
        *causes.few_samples(report),
        *causes.alike(report),
        *causes.selected(allocation),
        *causes.weak_part(allocation, report),
    ]
    if doubtful and report.calibration == "synthetic":
        lines.append("the samples are synthetic: give real ones with --calibration")
    if _is_off(allocation, report):
        lines.append(_inaccurate(allocation, config, report))
    cause: list[str] = []
    if doubtful:
        pinned = causes.pinned(allocation, config)
        cause = pinned and ((not config.spends_cost and _pin(allocation, config)) or pinned)
    if not cause and poor:
        more = _pin(allocation, config) or _more_bits(allocation, config)
        cause = (_more_cost(report) if config.spends_cost else more) or _in_float(allocation)
    return (*lines, *cause, *speed_hints(report))


def _is_off(allocation: Allocation, report: Report) -> bool:
    """Whether measured and predicted distortion are far apart, either way."""
    measured, predicted = report.measured, allocation.predicted
    return predicted > 0 and measured > 0 and not 1 / _OFF < measured / predicted < _OFF


def _inaccurate(allocation: Allocation, config: Config, report: Report) -> str:
    fix = "--measure probe" if config.effort == "best" else "--effort best"
    ratio = report.measured / allocation.predicted
    found = (
        f"measured distortion is {ratio:.1f} times the predicted one"
        if ratio > 1
        else f"predicted distortion is {1 / ratio:.1f} times the measured one"
    )
    return f"{found}: use more --samples ({report.samples} now) or {fix} for more accurate curves"


def _pin(allocation: Allocation, config: Config) -> list[str]:
    """Suggest a wider pin for the layer or activation of most distortion, if that is cheap."""
    units = [u for u in allocation.measurement.units() if not u.fusion]
    distortions, bits = allocation.distortions, allocation.bits
    curves, total = allocation.measurement.curves, allocation.predicted
    worst = max(units, key=lambda u: float(distortions[u.rows].sum()), default=None)
    if worst is None or (own := float(distortions[worst.rows].sum())) < _LARGE * total:
        return []
    offered = np.isfinite(curves.distortion[worst.rows]).all(axis=0)
    wider = [b for b in np.flatnonzero(offered).tolist() if b > bits[worst.rows].min()]
    left = {b: float(curves.distortion[worst.rows, b].sum()) for b in wider}
    width = next((b for b in wider if left[b] <= _TARGET * own), wider[-1] if wider else None)
    if width is None or left[width] >= own:
        return []
    spent = allocation.spent
    side: Side = "both" if config.joint else "weights" if worst.kind == "layer" else "activations"
    rows = _rows_of(side, allocation)
    extra = int(((width - bits[worst.rows]) * curves.elements[worst.rows]).sum())
    if not 0 < extra <= _EXPENSIVE * int(spent[rows].sum()):
        return []
    share = extra / float(spent[rows].sum())
    now = config.activation_bits if side == "activations" else _weight_bits(allocation, config)
    budget = max(_up((int(spent[rows].sum()) + extra) / int(curves.elements[rows].sum())), now or 0.0)
    trial = with_budget(replace(config, pins=(*config.pins, (as_pattern(worst.name), width))), side, budget)
    predicted = _predicted(allocation, trial)
    if predicted is None or predicted >= total:
        return []
    who = f"{worst.kind} {worst.name}"
    if matched := next((width for p, width in config.pins if pins(p, [worst.name])), None):
        who += f", pinned to {causes.bits_word(matched)},"
    cause = f"{who} causes {100 * own / total:.0f} % of the distortion"
    options = f"{pin_of(worst.name, width)} {_budget_option(side, budget)}"
    effect = f"costs {100 * share:.1f} % more bits and leaves {100 * predicted / total:.0f} % of the total"
    return [f"{cause}: {options} {effect}"]


def _more_bits(allocation: Allocation, config: Config) -> list[str]:
    """Suggest one more bit for the side of more distortion."""
    distortions, total = allocation.distortions, allocation.predicted
    sides: Sequence[Side] = ("weights", "activations")
    if config.joint or config.activation_bits is None:
        sides = ("both",) if config.joint else ("weights",)
    side = max(sides, key=lambda s: float(distortions[_rows_of(s, allocation)].sum()))
    now = config.activation_bits if side == "activations" else _weight_bits(allocation, config)
    if now is None or now >= MAX_BITS or total <= 0:
        return []
    budget = min(now + 1, MAX_BITS)
    predicted = _predicted(allocation, with_budget(config, side, budget))
    if predicted is None or predicted >= total:
        return []
    cause = "weights and activations cause" if side == "both" else f"{side} cause"
    share = 100 * float(distortions[_rows_of(side, allocation)].sum()) / total
    effect = f"{_budget_option(side, budget)} leaves {100 * predicted / total:.0f} % of the total"
    return [f"{cause} {share:.0f} % of the distortion: {effect}"]


def _more_cost(report: Report) -> list[str]:
    """Suggest the cheapest of the budgets traced that leaves a quarter of the distortion."""
    cost = report.cost
    if cost is None or report.predicted <= 0:
        return []
    wider = [p for p in cost.frontier if p.bits > cost.spent and p.distortion <= _TARGET * report.predicted]
    if not wider:
        return []
    budget = f"{100 * wider[0].bits / cost.at_8_bits:.4g}%" if cost.at_8_bits else f"{wider[0].bits:.6g}"
    return [
        f"--budget {budget} leaves {100 * wider[0].distortion / report.predicted:.0f} % of the predicted distortion"
    ]


def _in_float(allocation: Allocation) -> list[str]:
    """Suggest to exclude the layer of most distortion, where no width helps."""
    distortions, total = allocation.distortions, allocation.predicted
    layers = [u for u in allocation.measurement.units() if u.kind == "layer"]
    worst = max(layers, key=lambda u: float(distortions[u.rows].sum()), default=None)
    if worst is None:
        return []
    share = f"{100 * float(distortions[worst.rows].sum()) / total:.0f} % of the distortion" if total > 0 else "most"
    pattern = shlex.quote(as_pattern(worst.name))
    return [f"no wider width helps: --exclude {pattern} leaves in float the layer that causes {share}"]


def _weight_bits(allocation: Allocation, config: Config) -> float:
    return config.weight_bits if config.size is None else _up(allocation.weight_average)


def _rows_of(side: Side, allocation: Allocation) -> NDArray[np.int64]:
    """Return the rows of the curves that belong to the budget of `side`."""
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
