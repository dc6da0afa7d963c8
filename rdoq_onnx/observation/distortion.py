"""The distortion of a network's outputs (Eq. 7 and 8): δ = E_x ‖F̃(perturbed) - F(x)‖² / D.

D is the number of measured elements of one sample. Where the outputs have several parts (parts.py), a tensor t of part
p is multiplied by w_t first, so that each part weighs the same, whatever its unit and its size:

    w_t² = D / (P · T_p · E‖y_t‖²),    P parts, T_p tensors in part p.

Where samples have different shapes, D and the elements of a tensor are those of an average sample, and what a sample
adds is scaled by these over its own: a sample's distortion is per element of its own, and each sample weighs the same.

Tensors that are not floating point, or have no elements, are left out.

Of rows of logits the other metric, "kl", takes their mean divergence KL(p‖p̃) (logits.py) in nats a row. To second order
it is the mean of squares above as well, of φ(z) = √(2 softmax(z)) in place of z:

    KL(p‖p̃) ≈ ‖φ(z̃) - φ(z)‖²,    and so    w_t² = D / (P · rows of t),

since 4 ‖√p - √p̃‖² ≈ Δzᵀ (diag p - p pᵀ) Δz. Caches beside the logits do not count then.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.observation.logits import divergences, spreads
from rdoq_onnx.observation.parts import Part

MetricName = Literal["mse", "kl"]
Array = NDArray[Any]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Rows of logits among the measured tensors.

    axes: that of each tensor's classes, None for caches. weights: w of each tensor, 0 for caches. power: the mean
    divergence, to second order, of rows without any logits.
    """

    axes: tuple[int | None, ...]
    weights: tuple[float, ...]
    power: float


@dataclass(frozen=True)
class Metric:
    """How outputs are compared.

    parts: what they consist of. weights, sizes: w of each tensor and its elements in one sample (in an average one if
    they `vary`), in the order of `outputs`. power: E‖y‖² / D of the weighted tensors, i.e. the δ at 0 dB; 1 if all
    are 0. rows: what the outputs hold of logits; None unless all but caches are. name: which of the two metrics.
    """

    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    power: float
    vary: bool = False
    rows: Rows | None = None
    name: MetricName = "mse"

    @property
    def divergence(self) -> "Metric | None":
        """The same by divergence; None without rows of logits."""
        return None if self.rows is None else replace(self, name="kl")

    @property
    def sequential(self) -> bool:
        """Whether each part holds several rows of logits a sample, along the last axis, as of a language model."""
        if self.rows is None:
            return False
        counted = [(w, axis) for w, axis in zip(self.rows.weights, self.rows.axes, strict=True) if w > 0]
        most = self.elements / (len(counted) * max(w for w, _ in counted) ** 2)  # D / (P w²), the rows of a tensor
        return most > 1.5 and all(axis == -1 for _, axis in counted)

    @property
    def signal(self) -> float:
        """The δ of outputs that are all 0, in the unit of the metric; for `kl` to second order."""
        return self.rows.power if self.rows is not None and self.name == "kl" else self.power

    @property
    def axes(self) -> tuple[int | None, ...]:
        """For `kl` the axis of each tensor's classes, else None for each."""
        return self.rows.axes if self.rows is not None and self.name == "kl" else (None,) * len(self.weights)

    @property
    def factors(self) -> tuple[float, ...]:
        """W of each tensor in the metric; those of 0 are not counted."""
        return self.rows.weights if self.rows is not None and self.name == "kl" else self.weights

    @property
    def elements(self) -> int:
        """D."""
        return sum(self.sizes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the measured tensors."""
        return tuple(piece.measured for part in self.parts for piece in part.pieces)

    def errors(self, values: Sequence[Array], reference: Sequence[Array], samples: int) -> Float:
        """Return ‖values - reference‖² / D of each sample, [samples]; axis 0 of every tensor runs over the samples."""
        total: Float = self.part_errors(values, reference, samples).sum(axis=1)
        return total

    def part_errors(self, values: Sequence[Array], reference: Sequence[Array], samples: int) -> Float:
        """Return what each part adds to `errors`, [samples, parts]."""
        total = np.zeros((samples, len(self.parts)))
        columns = [k for k, part in enumerate(self.parts) for _ in part.pieces]
        axes = self.axes
        for k, (value, expected, weight) in enumerate(zip(values, reference, self.factors, strict=True)):
            if not weight:
                continue
            axis = axes[k]
            if axis is None:
                terms = np.square((value.astype(np.float64) - expected) * weight)
            else:
                axis = axis if axis < 0 else axis - expected.ndim
                terms = weight**2 * divergences(value, expected, axis)
            total[:, columns[k]] += terms.reshape(samples, -1).sum(axis=1) * self.share(k, value.size // samples)
        return total / self.elements

    def share(self, index: int, elements: int) -> float:
        """Return the factor of the squared errors of tensor `index` in a sample that has `elements` of it."""
        return self.sizes[index] / max(elements, 1) if self.vary else 1.0

    def of_part(self, index: int) -> "Metric":
        """The same for one part alone: what it adds to δ."""
        first = sum(len(part.pieces) for part in self.parts[:index])
        chosen = slice(first, first + len(self.parts[index].pieces))
        sizes = self.sizes[chosen]
        rescale = (sum(sizes) / self.elements) ** 0.5  # δ stays divided by the D of all parts
        weights = tuple(w * rescale for w in self.weights[chosen])
        rows = self.rows
        if rows is not None:
            counted = tuple(w * rescale for w in rows.weights[chosen])
            rows = Rows(rows.axes[chosen], counted, rows.power / sum(w > 0 for w in rows.weights))
        return Metric((self.parts[index],), weights, sizes, self.power / len(self.parts), self.vary, rows, self.name)


def metric_of(parts: Sequence[Part], batches: Iterable[tuple[int, Mapping[str, Array]]], samples: int) -> Metric:
    """Build the metric from pairs of a number of samples and the values of the parts' tensors, `samples` in total.

    Raises CalibrationError if there is no floating-point output to compare, or one is not finite.
    """
    powers: dict[str, dict[int, float]] = {}  # by tensor and its elements in a sample
    count: dict[str, int] = {}
    divergent = _Divergent.of(parts)
    for number, values in batches:
        for name, value in values.items():
            if np.asarray(value).dtype.kind == "f":
                own, size = powers.setdefault(name, {}), value.size // number
                own[size] = own.get(size, 0.0) + float(np.square(value.astype(np.float64)).sum())
                count[name] = count.get(name, 0) + value.size
        if divergent is not None:
            divergent.add(number, values)
    kept = _measurable(parts, count)
    if not kept and count:
        raise CalibrationError(
            "no output has elements on these samples, so there is no distortion to measure; give others"
        )
    if not kept:
        raise CalibrationError(
            "the model has no floating-point output, so there is no distortion to measure; "
            "export it with its scores as an output (scikit-learn: zipmap=False)"
        )
    sizes = {name: size // samples for name, size in count.items()}
    power = {
        n: sum(p if len(own) == 1 else p * sizes[n] / max(s, 1) for s, p in own.items()) for n, own in powers.items()
    }
    pieces = [(piece, len(part.pieces)) for part in kept for piece in part.pieces]
    for piece, _ in pieces:
        if not np.isfinite(power[piece.measured]):
            raise CalibrationError(
                f"output {piece.output!r} of the float model is not finite on the given samples; "
                "check them, and use a large finite value in masks"
            )
    average = tuple(sizes[piece.measured] for piece, _ in pieces)
    elements = sum(average)
    shares = [power[piece.measured] / samples * len(kept) * several / elements for piece, several in pieces]
    weights = [1.0 / share**0.5 if len(pieces) > 1 and share > 0 else 1.0 for share in shares]
    total = sum(power[piece.measured] * weight**2 for (piece, _), weight in zip(pieces, weights, strict=True))
    vary = any(len(powers[piece.measured]) > 1 for piece, _ in pieces)
    rows = None if divergent is None else divergent.rows(kept, average, samples)
    return Metric(kept, tuple(weights), average, total / max(samples * elements, 1) or 1.0, vary, rows)


@dataclass(frozen=True)
class _Divergent:
    """Sums over the rows of logits of a network, by measured tensor: its `axes`, classes and ½ zᵀ (diag p - p pᵀ) z."""

    axes: Mapping[str, int]
    classes: dict[str, int]
    sums: dict[str, float]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "_Divergent | None":
        axes = logit_axes(parts)
        return cls(axes, {}, dict.fromkeys(axes, 0.0)) if axes else None

    def add(self, samples: int, values: Mapping[str, Array]) -> None:
        """Add a batch."""
        for name, axis in self.axes.items():
            value = np.asarray(values[name])
            if value.size and value.dtype.kind == "f" and np.isfinite(value).any():
                self.classes[name] = value.shape[axis]
                self.sums[name] += samples * float(spreads(value, axis).mean())

    def rows(self, parts: Sequence[Part], sizes: Sequence[int], samples: int) -> Rows | None:
        """Return what is known of the rows; None if some part has none."""
        names = [piece.measured for part in parts for piece in part.pieces]
        if any(name not in self.classes for name in self.axes):
            return None
        each = sum(sizes) / len(self.axes)  # D / P
        weights = (
            (each * self.classes[name] / max(size, 1)) ** 0.5 if name in self.axes else 0.0
            for name, size in zip(names, sizes, strict=True)
        )
        power = sum(self.sums.values()) / (samples * len(self.axes))
        return Rows(tuple(self.axes.get(name) for name in names), tuple(weights), power or 1.0)


def logit_axes(parts: Sequence[Part]) -> dict[str, int]:
    """Return the axis of the classes of each measured tensor; none at all unless all parts but caches have one."""
    counted = [part for part in parts if not part.cached]
    axes = {p.measured: p.classes for part in counted for p in part.pieces if p.classes is not None}
    return axes if counted and len(axes) == sum(len(part.pieces) for part in counted) else {}


def _measurable(parts: Sequence[Part], count: Mapping[str, int]) -> tuple[Part, ...]:
    """`parts` without what is not floating point or has no elements."""
    kept = (replace(part, pieces=tuple(p for p in part.pieces if count.get(p.measured))) for part in parts)
    return tuple(part for part in kept if part.pieces)


def sqnr_db(signal: float, noise: float) -> float:
    """Return 10 log10 of signal power over noise power, in dB; infinite without noise."""
    if noise <= 0:
        return float("inf")
    return float(10 * np.log10(max(signal, 1e-300) / noise))
