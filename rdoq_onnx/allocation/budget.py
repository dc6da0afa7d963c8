"""Allocate widths to channels and activations within budgets and pins."""

import itertools
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocate import Solution, solve
from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.block_sizes import Room, choose_blocks, fewest_scales
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.allocation.layer_limit import least_bytes, within_limit
from rdoq_onnx.allocation.pins import pinned
from rdoq_onnx.config import MAX_BITS, Budgets, Side
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError

_SLACK = 1e-6  # bits that rounding of a budget may cost


def allocate_bits(
    measurement: Measurement, budgets: Budgets, weigh: NDArray[np.float64] | None = None, bound: float | None = None
) -> Allocation:
    """Choose the widths of least predicted distortion within `budgets`, and how many weights share a scale.

    weigh: weight of each row of the curves in that choice; blocks of scales then stay as they are. bound: the
    `Allocation.bound` of these curves and budgets if already known; it does not depend on `weigh`.
    Within a budget of other costs than bytes, each channel has one scale where it may.
    Raises BudgetError if the narrowest allowed widths exceed a budget.
    """
    budgets = in_bytes(measurement, budgets)
    if budgets.budget is not None:
        measurement = fewest_scales(measurement) if weigh is None else measurement
        return _allocate(measurement, budgets, pinned(measurement, budgets.pins), weigh, bound)
    curves = pinned(measurement, budgets.pins)
    groups = budgets.storage == "nbits"
    if weigh is None and (groups or any(each.options for each in measurement.layers)):
        allowed, limit = np.isfinite(curves.distortion), budgets.layer_limit
        room = Room(_weight_budget(measurement, budgets), None if limit is None else 8 * limit, groups)
        measurement, bound = choose_blocks(measurement, allowed, room)
        curves = measurement.curves.restrict(allowed)
    return _allocate(measurement, budgets, curves, weigh, bound)


def in_bytes(measurement: Measurement, budgets: Budgets) -> Budgets:
    """Return `budgets` with one of bytes as `size`, beside activations of 8 bits, which cost none."""
    if budgets.budget is None or budgets.cost is None or budgets.cost.name != "size":
        return budgets
    size = int(budgets.budget.of(float(measurement.curves.elements[: measurement.channels].sum())))
    activations = None if budgets.activation_bits is None else float(MAX_BITS)
    return replace(budgets, budget=None, size=size, activation_bits=activations)


def _weight_budget(measurement: Measurement, budgets: Budgets) -> int:
    """Return the bits that all weights may take."""
    if budgets.size is not None:
        return 8 * budgets.size
    elements = int(measurement.curves.elements[: measurement.channels].sum())
    return int(budgets.weight_bits * elements + _SLACK)


def uniform_bits(measurement: Measurement, budgets: Budgets, side: Side = "both") -> Allocation | None:
    """Give all weights one width and all activations one width, the widest within the budgets; pins hold.

    Channels have one scale each if that is offered. side: "weights" or "activations" to do so on that side only.
    Returns None if pins or --layer-limit leave no room.
    """
    budgets = in_bytes(measurement, budgets)
    measurement = fewest_scales(measurement)
    curves = pinned(measurement, budgets.pins)
    if budgets.budget is not None:
        return _uniform_pair(measurement, budgets, curves)
    first = measurement.channels
    feeding = [first + k for k, a in enumerate(measurement.network.activations) if not a.fusion]
    mask = np.ones(curves.distortion.shape, bool)
    weight_bits = budgets.weight_bits
    if budgets.size is not None:
        weight_bits = min(8 * budgets.size / float(curves.elements[:first].sum()), MAX_BITS)
    sides = (
        ("weights", np.arange(first), weight_bits),
        ("activations", np.array(feeding, np.int64), budgets.activation_bits),
    )
    for name, rows, bits in sides:
        if bits is not None and len(rows) and side in ("both", name):
            chosen = _one_width(curves.take(rows), bits)
            if chosen is None:
                return None
            mask[rows] = False
            mask[rows, chosen] = True
    try:
        return _allocate(measurement, budgets, curves.restrict(mask))
    except BudgetError:
        return None


def _uniform_pair(measurement: Measurement, budgets: Budgets, curves: Curves) -> Allocation | None:
    """Give all weights and all activations one width each, those of least distortion that the budget allows."""
    channels, columns = measurement.channels, np.arange(curves.distortion.shape[1])
    feeding = channels + np.array([k for k, a in enumerate(measurement.network.activations) if not a.fusion], np.int64)
    allowed = np.isfinite(curves.distortion)
    pairs = []
    for widths in itertools.product(columns[1:], columns[1:] if len(feeding) else columns[-1:]):
        chosen = np.full(len(allowed), MAX_BITS)
        for rows, width in zip((np.arange(channels), feeding), widths, strict=True):
            nearest = np.where(allowed[rows] & (columns <= width), columns, -1).max(axis=1)
            chosen[rows] = np.where(nearest >= 0, nearest, allowed[rows].argmax(axis=1))
        pairs.append((float(curves.distortion[np.arange(len(chosen)), chosen].sum()), chosen))
    pricing = Pricing(measurement, budgets.cost) if budgets.cost is not None else None
    limit = math.inf if pricing is None or budgets.budget is None else pricing.budget(budgets.budget)
    for _, chosen in sorted(pairs, key=lambda pair: pair[0]):
        if pricing is None or sum(pricing.spent(chosen).values()) > limit * (1 + _SLACK):
            continue
        with suppress(BudgetError):
            return _allocate(measurement, budgets, curves.restrict(columns == chosen[:, None]))
    return None


def allocate_near(allocation: Allocation, budgets: Budgets, distance: int) -> Allocation:
    """Allocate within the budgets, no width further than `distance` bits from that of `allocation`."""
    measurement = allocation.measurement
    budgets = in_bytes(measurement, budgets)
    curves = pinned(measurement, budgets.pins)
    near = np.abs(np.arange(curves.distortion.shape[1]) - allocation.bits[:, None]) <= distance
    return _allocate(measurement, budgets, curves.restrict(near))


def allocate_activations(allocation: Allocation, curves: Curves, budgets: Budgets) -> Allocation:
    """Allocate the activations of `allocation` again, by other `curves`; all weights keep their widths.

    The figures predicted stay those of the allocation's own curves.
    """
    measurement = replace(allocation.measurement, curves=curves)
    columns, rows = np.arange(curves.distortion.shape[1]), np.arange(len(allocation.bits))
    allowed = (columns == allocation.bits[:, None]) | (rows >= measurement.channels)[:, None]
    limits = in_bytes(measurement, budgets)
    found = _allocate(measurement, limits, pinned(measurement, limits.pins).restrict(allowed))
    moved = replace(allocation, activation_bits=found.activation_bits)
    predicted = float(moved.distortions.sum())
    return replace(moved, predicted=predicted, gap=max(1 - allocation.bound / max(predicted, 1e-300), 0.0))


def _one_width(curves: Curves, bits: float) -> NDArray[np.int64] | None:
    """Return the widest width within the budget for each row; rows without it take the nearest narrower one."""
    allowed = np.isfinite(curves.distortion)
    columns = np.arange(allowed.shape[1])
    for width in range(int(bits), -1, -1):
        nearest = np.where(allowed & (columns <= width), columns, -1).max(axis=1)
        chosen: NDArray[np.int64] = np.where(nearest >= 0, nearest, allowed.argmax(axis=1))
        if curves.spent(chosen).sum() <= bits * curves.elements.sum():
            return chosen
    return None


def _allocate(
    measurement: Measurement,
    budgets: Budgets,
    curves: Curves,
    weigh: NDArray[np.float64] | None = None,
    bound: float | None = None,
) -> Allocation:
    weighed = curves if weigh is None else replace(curves, distortion=curves.distortion * weigh[:, None])
    channels, total = measurement.channels, len(curves.elements)
    fusion = channels + np.array([k for k, a in enumerate(measurement.network.activations) if a.fusion], np.int64)
    solve_all = _within_cost if budgets.budget is not None else _within_bits
    choice, dual = solve_all(measurement, budgets, weighed)
    if weigh is not None and bound is None:
        dual = solve_all(measurement, budgets, curves)[1]
    choice[fusion] = MAX_BITS
    dual += float(curves.distortion[fusion, MAX_BITS].sum())
    if budgets.layer_limit is not None:
        capped = within_limit(measurement, budgets, curves, weighed, choice)
        if capped is not None:
            known = dual if bound is None and budgets.layer_limit_activations else bound
            return _allocate(measurement, budgets, capped, weigh, known)
    predicted = float(curves.distortion[np.arange(total), choice].sum())
    lower = dual if bound is None else bound
    return Allocation(
        measurement,
        tuple(measurement.per_layer(choice)),
        tuple(int(b) for b in choice[channels:]),
        predicted,
        max(predicted - lower, 0.0) / max(predicted, 1e-300),
    )


def _within_cost(measurement: Measurement, budgets: Budgets, curves: Curves) -> tuple[NDArray[np.int64], float]:
    """Return the widths of least distortion within `budgets.budget`, and a bound on the distortion of any."""
    if budgets.budget is None or budgets.cost is None:
        raise ValueError("no budget of a cost")
    return Pricing(measurement, budgets.cost).solve(curves, budgets.budget)


def _within_bits(measurement: Measurement, budgets: Budgets, curves: Curves) -> tuple[NDArray[np.int64], float]:
    """The same within budgets of bits, for weights and activations apart or together."""
    activations = measurement.network.activations
    weights = np.arange(measurement.channels)
    feeding = measurement.channels + np.array([k for k, a in enumerate(activations) if not a.fusion], np.int64)
    choice, dual = np.zeros(len(curves.elements), np.int64), 0.0
    if budgets.joint and budgets.activation_bits is not None:
        groups = [("--bits", np.concatenate([weights, feeding]), budgets.weight_bits)]
    else:
        groups = [("--weight-bits", weights, budgets.weight_bits)]
        if budgets.size is not None:
            least = least_bytes(curves.take(weights))
            if budgets.size < least:
                raise BudgetError(
                    f"--size {budgets.size} cannot be met: the narrowest allowed widths take {least} bytes; "
                    "give that much or allow narrower widths"
                )
            groups = [("--size", weights, 8 * budgets.size / int(curves.elements[weights].sum()))]
        if len(feeding) and budgets.activation_bits is not None:
            groups.append(("--activation-bits", feeding, budgets.activation_bits))
    for option, rows, bits in groups if len(choice) else ():
        solution = _solve(option, curves.take(rows), bits)
        choice[rows] = solution.choice
        dual += solution.bound
    return choice, dual


def _solve(option: str, curves: Curves, bits: float) -> Solution:
    try:
        return solve(curves, int(bits * int(curves.elements.sum()) + _SLACK))
    except BudgetError as error:
        raise BudgetError(f"{option} {bits:g} cannot be met: {error}") from error
