"""Budgets and pins in, a width for every channel and activation out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocate import Solution, solve
from rdoq_onnx.analysis import layer_names
from rdoq_onnx.config import MAX_BITS, Config, Side
from rdoq_onnx.curves import Curves
from rdoq_onnx.errors import BudgetError, ConfigError
from rdoq_onnx.measurement import Measurement
from rdoq_onnx.patterns import channel_range, matches, nearest
from rdoq_onnx.weight_only import widths


@dataclass(frozen=True)
class Allocation:
    """A width for everything that is quantized.

    layer_bits: for each layer, the width of each channel. activation_bits: the width of each activation.
    predicted: sum of all δ, by additivity (Eq. 6) the distortion of the whole. gap: how far from the optimum of the
    curves it can be at most, relative. weight_only_bits: the width of each of the network's `weight_only`, which no
    budget covers.
    """

    measurement: Measurement
    layer_bits: tuple[NDArray[np.int64], ...]
    activation_bits: tuple[int, ...]
    predicted: float
    gap: float
    weight_only_bits: tuple[int, ...]

    @property
    def weight_average(self) -> float:
        """Bits per weight, over all that are searched; 0 if none are."""
        channels = self.measurement.channels
        return _average(self.bits[:channels], self.measurement.curves.elements[:channels])

    @property
    def activation_average(self) -> float | None:
        """Bits per element over the activations that feed layers; None if none is quantized."""
        feeding = np.array([not a.fusion for a in self.measurement.network.activations], bool)
        if not feeding.any():
            return None
        elements = self.measurement.curves.elements[self.measurement.channels :]
        return _average(np.array(self.activation_bits)[feeding], elements[feeding])

    @property
    def joint_average(self) -> float:
        """Bits per element over weights and the activations that feed layers."""
        counted = [True] * self.measurement.channels + [not a.fusion for a in self.measurement.network.activations]
        return _average(self.bits[counted], self.measurement.curves.elements[counted])

    @property
    def bits(self) -> NDArray[np.int64]:
        """The width of each row of the curves: all channels, then all activations."""
        return np.concatenate([*self.layer_bits, np.array(self.activation_bits, np.int64)])

    @property
    def bound(self) -> float:
        """What no widths within the budgets get under, by the curves."""
        return self.predicted * (1 - self.gap)

    @property
    def distortions(self) -> NDArray[np.float64]:
        """The predicted δ of each row of the curves at its width."""
        bits = self.bits
        return self.measurement.curves.distortion[np.arange(len(bits)), bits]


def allocate_bits(
    measurement: Measurement, config: Config, weigh: NDArray[np.float64] | None = None, bound: float | None = None
) -> Allocation:
    """The widths of least predicted distortion within the budgets of `config`.

    weigh: what each row of the curves counts when widths are chosen, 1 by default. bound: the `Allocation.bound` of
    these curves and budgets, which no weights change, where it is known.
    Raises BudgetError if the narrowest widths allowed are over a budget.
    """
    return _allocate(measurement, config, pinned(measurement, config.pins), weigh, bound)


def uniform_bits(measurement: Measurement, config: Config, side: Side = "both") -> Allocation | None:
    """One width for all weights and one for all activations, the widest within the budgets; pins hold.

    side: "weights" or "activations" for one width on that side alone. None where pins or --layer-limit leave no
    room for that.
    """
    curves = pinned(measurement, config.pins)
    first = measurement.channels
    feeding = [first + k for k, a in enumerate(measurement.network.activations) if not a.fusion]
    mask = np.ones(curves.distortion.shape, bool)
    weight_bits = config.weight_bits
    if config.size is not None:
        weight_bits = min(8 * config.size / float(curves.elements[:first].sum()), MAX_BITS)
    sides = (
        ("weights", np.arange(first), weight_bits),
        ("activations", np.array(feeding, np.int64), config.activation_bits),
    )
    for name, rows, bits in sides:
        if bits is not None and len(rows) and side in ("both", name):
            chosen = _one_width(curves.take(rows), bits)
            if chosen is None:
                return None
            mask[rows] = False
            mask[rows, chosen] = True
    try:
        return _allocate(measurement, config, curves.restrict(mask))
    except BudgetError:
        return None


def _one_width(curves: Curves, bits: float) -> NDArray[np.int64] | None:
    """The widest width within the budget, for each row; rows that do not offer it take the nearest under it."""
    allowed = np.isfinite(curves.distortion)
    columns = np.arange(allowed.shape[1])
    for width in range(int(bits), -1, -1):
        under = np.where(allowed & (columns <= width), columns, -1).max(axis=1)
        chosen: NDArray[np.int64] = np.where(under >= 0, under, allowed.argmax(axis=1))
        if (chosen * curves.elements).sum() <= bits * curves.elements.sum():
            return chosen
    return None


def _allocate(
    measurement: Measurement,
    config: Config,
    curves: Curves,
    weigh: NDArray[np.float64] | None = None,
    bound: float | None = None,
) -> Allocation:
    weighed = curves if weigh is None else replace(curves, distortion=curves.distortion * weigh[:, None])
    channels, total = measurement.channels, len(curves.elements)
    activations = measurement.network.activations
    weights = np.arange(channels)
    feeding = channels + np.array([k for k, a in enumerate(activations) if not a.fusion], np.int64)
    fusion = channels + np.array([k for k, a in enumerate(activations) if a.fusion], np.int64)
    choice = np.zeros(total, np.int64)
    choice[fusion] = MAX_BITS
    dual = float(curves.distortion[fusion, MAX_BITS].sum())  # and the bounds of the groups, below
    if config.joint and config.activation_bits is not None:
        groups = [("--bits", np.concatenate([weights, feeding]), config.weight_bits)]
    else:
        groups = [("--weight-bits", weights, config.weight_bits)]
        if config.size is not None:
            least = _least_bytes(curves.take(weights))
            if config.size < least:
                raise BudgetError(
                    f"--size {config.size} cannot be met: the narrowest allowed widths take {least} bytes; "
                    "give that much or allow narrower widths"
                )
            groups = [("--size", weights, 8 * config.size / int(curves.elements[weights].sum()))]
        if len(feeding) and config.activation_bits is not None:
            groups.append(("--activation-bits", feeding, config.activation_bits))
    for option, rows, bits in groups if total else ():
        solution = _solve(option, weighed.take(rows), bits)
        choice[rows] = solution.choice
        if bound is None:
            dual += (solution if weigh is None else _solve(option, curves.take(rows), bits)).bound
    if config.layer_limit is not None:
        capped = _capped(measurement, config.layer_limit, curves, weighed, choice)
        if capped is not None:
            return _allocate(measurement, config, capped, weigh, bound)
    predicted = float(curves.distortion[np.arange(total), choice].sum())
    under = dual if bound is None else bound
    return Allocation(
        measurement,
        tuple(measurement.per_layer(choice)),
        tuple(int(b) for b in choice[channels:]),
        predicted,
        max(predicted - under, 0.0) / max(predicted, 1e-300),
        widths(measurement.network.weight_only, config.pins),
    )


def _capped(
    measurement: Measurement, limit: int, curves: Curves, weighed: Curves, choice: NDArray[np.int64]
) -> Curves | None:
    """`curves` with the layers that `choice` puts over `limit` bytes at the best widths within it; None if none is.

    What they leave goes to the others, which may then be over it in turn. Their Lagrangian slope only falls, so a layer
    that was over the limit stays at it. Raises BudgetError if the narrowest widths of a layer are over it.
    """
    mask = np.ones(curves.distortion.shape, bool)
    for layer, rows in zip(measurement.network.layers, measurement.unit_rows(), strict=True):
        units = np.arange(rows.start, rows.stop)
        if (choice[units] * curves.elements[units]).sum() <= 8 * limit:
            continue
        try:
            within = solve(weighed.take(units), 8 * limit).choice
        except BudgetError as error:
            raise BudgetError(
                f"--layer-limit {limit} cannot be met: the narrowest allowed widths of layer {layer.name!r} take "
                f"{_least_bytes(curves.take(units))} bytes; give that much or allow narrower widths"
            ) from error
        mask[units] = np.arange(curves.distortion.shape[1]) == within[:, None]
    return None if mask.all() else curves.restrict(mask)


def _least_bytes(curves: Curves) -> int:
    """What the narrowest allowed widths take."""
    narrowest = np.isfinite(curves.distortion).argmax(axis=1)
    return -(-int((curves.widths[narrowest] * curves.elements).sum()) // 8)


def pinned(measurement: Measurement, pins: Sequence[tuple[str, int]]) -> Curves:
    """The curves with the widths of pinned layers and activations as the only ones allowed.

    A width that a layer does not offer is taken as the nearest one under it. Raises ConfigError if there is none,
    or if a pattern matches nothing.
    """
    distortion = measurement.curves.distortion
    mask = np.ones(distortion.shape, bool)
    for pattern, bits in pins:
        name, channels = channel_range(pattern)
        fitting = [(k, _part(u, channels)) for k, u in _named_rows(measurement) if matches(name, k)]
        if not fitting and not any(matches(name, w.names) for w in measurement.network.weight_only):
            known_names = [n for names, _ in _named_rows(measurement) for n in names]
            raise ConfigError(f"--pin {pattern}={bits} matches no layer or activation{nearest(name, known_names)}")
        for known, units in fitting:
            if units.start >= units.stop:
                raise ConfigError(f"--pin {pattern}={bits}: {known[0]!r} has no such channels")
            offered = np.flatnonzero(np.isfinite(distortion[units]).all(axis=0))
            under = offered[offered <= bits]
            if not len(under):
                found = f"--pin {pattern}={bits}: {known[0]!r} offers {offered.tolist()} bits"
                raise ConfigError(f"{found}; give one of them or allow more --widths")
            mask[units] = np.arange(distortion.shape[1]) == under[-1]
    return measurement.curves.restrict(mask)


def _part(rows: slice, channels: slice | None) -> slice:
    """The rows of some of a layer's channels."""
    if channels is None:
        return rows
    first, last, _ = channels.indices(rows.stop - rows.start)
    return slice(rows.start + first, rows.start + last)


def _named_rows(measurement: Measurement) -> list[tuple[tuple[str, ...], slice]]:
    """The names that patterns know each layer and activation by, with its rows of the curves."""
    layers = zip(map(layer_names, measurement.network.layers), measurement.unit_rows(), strict=True)
    first = measurement.channels
    activations = measurement.network.activations
    return [*layers, *((a.names, slice(first + k, first + k + 1)) for k, a in enumerate(activations))]


def _solve(option: str, curves: Curves, bits: float) -> Solution:
    try:
        return solve(curves, int(bits * int(curves.elements.sum()) + 1e-6))
    except BudgetError as error:
        raise BudgetError(f"{option} {bits:g} cannot be met: {error}") from error


def _average(bits: NDArray[np.int64], elements: NDArray[np.int64]) -> float:
    return float((bits * elements).sum() / max(elements.sum(), 1))
