"""The variables of the tuning, and the codes, scales, biases and quantizers that they stand for.

    weight       Ŵ = s q,  q = clip(round(v), l, h),  s = s_0 exp(t):   ∂L/∂v = s ∂L/∂Ŵ,  ∂L/∂t = Σ s q ∂L/∂Ŵ
    activation   s = s_0 exp(t),  z = round(u):                         ∂L/∂t = s ∂L/∂s,  ∂L/∂u = ∂L/∂z
    bias         b = b_0 + σ β:                                         ∂L/∂β = σ ∂L/∂b

Gradients of few samples are noisy. Where noise alone moves them, weights gather at the thresholds between two integers
and flip to and fro (Nagel et al., ICML 2022). So each step also pulls v towards its integer,

    v ← v + p (round(v) - v),

which only those overcome whose gradients agree. v is in steps of its scale and σ is the spread of the layer's outputs,
so one rate of learning serves all variables of a kind. Widths and windows l..h stay the allocation's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.model.codes import Affine, WeightCodes, halved, stored
from rdoq_onnx.reconstruction.parametrized import Site

Array = NDArray[Any]
Floats = NDArray[np.float32]
Kind = Literal["codes", "scales", "biases", "steps", "zeros"]

_NEAR = 0.3  # steps that a weight may be from its integer at the start


@dataclass(frozen=True)
class Weight:
    """A layer's weight. start: s_0, [units], or [units, B] of blocks, as is t; low, high [units, 1]; v [units, K]."""

    sites: tuple[Site, ...]
    start: Floats
    low: Floats
    high: Floats
    v: Floats
    t: Floats

    @classmethod
    def of(cls, sites: tuple[Site, ...], rows: Floats, codes: WeightCodes, window: tuple[Floats, Floats]) -> "Weight":
        """Start at `codes`, each v as near to the float weights `rows` [units, K] as rounds to its code."""
        integers = codes.integers.astype(np.float32)
        v = np.clip(rows / _each(codes.scales, rows), integers - _NEAR, integers + _NEAR).astype(np.float32)
        return cls(sites, codes.scales, *window, v, np.zeros_like(codes.scales))

    @property
    def arrays(self) -> dict[Kind, Floats]:
        return {"codes": self.v, "scales": self.t}

    @property
    def codes(self) -> WeightCodes:
        """The integers, and the scales as a file stores them."""
        kept = stored if self.t.ndim == 1 else halved
        scales = np.where(self.t == 0, self.start, kept(self._scales)).astype(np.float32)
        return WeightCodes(self._integers.astype(np.int8), scales)

    def feeds(self) -> dict[str, Floats]:
        rows = self._integers * _each(self._scales, self.v)
        return {site.name: site.linear.tensor(rows) for site in self.sites}

    def gradients(self, found: Mapping[str, Array]) -> list[Floats]:
        """Return ∂L/∂v and ∂L/∂t."""
        rows: Any = sum(site.linear.rows(found[site.name]) for site in self.sites)
        rows = rows * _each(self._scales, self.v)
        return [rows, (rows * self._integers).reshape(*self.t.shape, -1).sum(axis=-1)]

    def confine(self, pull: float) -> None:
        """Keep v where it rounds to the window."""
        np.clip(self.v, self.low - 0.5, self.high + 0.5, out=self.v)
        np.add(self.v, np.float32(pull) * (self._integers - self.v), out=self.v)

    @property
    def _scales(self) -> Floats:
        scales: Floats = self.start * np.exp(self.t)
        return scales

    @property
    def _integers(self) -> Floats:
        integers: Floats = np.clip(np.rint(self.v), self.low, self.high)
        return integers


@dataclass(frozen=True)
class Bias:
    """The bias of a layer. start: b_0; unit: σ; beta: of b_0's shape."""

    name: str
    start: Floats
    unit: float
    beta: Floats

    @property
    def arrays(self) -> dict[Kind, Floats]:
        return {"biases": self.beta}

    @property
    def change(self) -> Floats:
        """b - b_0."""
        change: Floats = np.float32(self.unit) * self.beta
        return change

    def feeds(self) -> dict[str, Floats]:
        return {self.name: self.start + self.change}

    def gradients(self, found: Mapping[str, Array]) -> list[Floats]:
        """Return ∂L/∂β."""
        return [np.float32(self.unit) * found[self.name]]

    def confine(self, pull: float) -> None:
        """A bias may take any value."""


@dataclass(frozen=True)
class Quantizer:
    """The quantizer of an activation. zero: empty where the zero point stays; reach: of its values; t, u [1]."""

    scale: str
    zero: str
    start: Affine
    reach: float
    t: Floats
    u: Floats

    @property
    def arrays(self) -> dict[Kind, Floats]:
        return {"steps": self.t, "zeros": self.u}

    @property
    def affine(self) -> Affine:
        """The quantizer as it is now."""
        start = self.start
        zero = int(np.clip(np.rint(self.u[0]), start.low, start.high)) if self.zero else start.zero_point
        scale = float(start.scale * np.exp(self.t[0])) if self.t[0] else start.scale
        return Affine(scale, zero, start.low, start.high, start.signed)

    def feeds(self) -> dict[str, Floats]:
        now = self.affine
        values = {self.scale: now.scale} | ({self.zero: now.zero_point} if self.zero else {})
        return {name: np.array([value], np.float32) for name, value in values.items()}

    def gradients(self, found: Mapping[str, Array]) -> list[Floats]:
        """Return ∂L/∂t and ∂L/∂u."""
        zeros = found[self.zero] if self.zero and not self.start.signed else np.zeros(1, np.float32)
        return [found[self.scale] * np.float32(self.affine.scale), zeros]

    def confine(self, pull: float) -> None:
        """Keep the range within reach: beyond it, a clamp in front that it does the work of would have to stay."""
        top = self.start.range[1]
        most = np.log(max(self.reach / top, 1.0)) if top > 0 else 0.0
        np.minimum(self.t, np.float32(most), out=self.t)


Variable = Weight | Bias | Quantizer


def _each(scales: Floats, rows: Floats) -> Floats:
    """Return the scale of each of `rows` [units, K], or what broadcasts to it."""
    return scales[:, None] if scales.ndim == 1 else np.repeat(scales, rows.shape[1] // scales.shape[1], axis=1)
