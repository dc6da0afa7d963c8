"""First-order curves anchored to exact runs at low widths, where perturbations are too large for first order.

A whole layer at one width takes one exact run, and so does an activation under one quantizer. The curves of a layer's
channels at a width are scaled by r, the layer's exact δ over their sum, which accounts for interactions between the
channels; an activation's δ is replaced.

On n samples r has a relative error of √(2 / n), since interactions differ from sample to sample. It is shrunk towards
its mean over the layers, r̄, according to that error and d, the true spread of log r between layers:

    log r ← (1 - s) log r + s log r̄,    s = (2 / n) / (2 / n + d²).

Tables keep their curves, which also count rows that these samples do not look up.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measurement import Measurement, option_curves, with_curves, with_option_curves
from rdoq_onnx.curves.shrinkage import noise_share
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

WEIGHT_BITS = 3  # widest anchored weights
SAMPLES = (8, 32)  # per exact run: minimum and maximum
WORK = {"fast": 0.0, "default": 3e10, "best": 1e11}  # elements computed at most; larger networks are not anchored
# d at 0 to 3 bits: standard deviation of log r over layers, from networks measured on many samples.
_SPREADS = (0.7, 0.5, 0.2, 0.1)
_MAX_RATIO = 8.0  # a larger ratio reflects the few samples rather than the layer

Float = NDArray[np.float64]


def anchored(
    measurement: Measurement, config: Config, split: SampleSplit, runtime: Runtime, steps: Steps
) -> Measurement:
    """Anchor the curves of `measurement` to exact runs if the effort allows."""
    work = runs(measurement) * sum(measurement.observation.sizes.values())  # of one sample
    if config.measure == "probe" or not work:  # without low widths and activations, there is nothing to anchor
        return measurement
    affordable = min(int(WORK[config.effort] / work), SAMPLES[1])
    if affordable < SAMPLES[0]:
        return measurement
    observation = measurement.observation
    weights, activations = (
        Prober(measurement.aimed, samples.some(affordable), observation.metric, runtime, observation.batching)
        for samples in (split.measuring, split.judging)
    )
    parts, so_far = len(measurement.layers) + len(measurement.activations), steps.unfinished("ties")
    with workers(config.threads):  # also limits BLAS to one thread
        found = steps.step(
            "ties", parts, lambda advance: option_curves(anchor(measurement, weights, activations, advance, so_far))
        )
    return with_curves(measurement, found)


def anchor(
    measurement: Measurement,
    weights: Prober,
    activations: Prober,
    advance: Advance,
    unfinished: Unfinished | None = None,
) -> Measurement:
    """Anchor the curves of `measurement` to exact runs of the probers `weights` and `activations`.

    unfinished: state of an earlier run, which continues from there.
    """
    kept = unfinished or Unfinished()
    state = _State.of(measurement, kept.get())
    advance(state.done)
    layers = list(zip(measurement.layers, measurement.unit_rows(), strict=True))
    for k, (measured, rows) in enumerate(layers[state.done :], state.done):
        low = {b: c for b, c in measured.codes.items() if b <= WEIGHT_BITS}
        if (
            low
            and not measured.layer.looked_up
            and not any(u.output in measurement.probed for u in measured.layer.uses)
        ):
            exact = weights.whole_layer(measured.layer, list(low.values()), measured.mean)
            first_order = (state.distortion[rows, b] for b in low)
            state.ratios[k, list(low)] = list(map(ratio, exact, first_order))
        state = state.next(kept, advance)
    rest = list(enumerate(measurement.activations, measurement.channels))[state.done - len(layers) :]
    for row, each in rest:
        exact = activations.activation(each.activation, list(each.quantizers.values()))
        state.distortion[row, list(each.quantizers)] = exact
        state = state.next(kept, advance)
    distortion, anchored_layers = state.distortion, []
    factors = np.ones((len(layers), distortion.shape[1]))
    factors[:, : WEIGHT_BITS + 1] = shrunk(state.ratios, len(weights.samples))
    for (measured, rows), factor in zip(layers, factors, strict=True):
        distortion[rows] *= factor
        anchored_layers.append(with_option_curves(measured, [o.distortion * factor for o in measured.options]))
    curves = replace(measurement.curves, distortion=distortion)
    return replace(measurement, layers=tuple(anchored_layers), curves=curves)


@dataclass(frozen=True)
class _State:
    """Progress of `anchor`. ratios: r [layers, widths], NaN where not measured."""

    done: int
    ratios: Float
    distortion: Float

    @classmethod
    def of(cls, measurement: Measurement, before: dict[str, Any] | None) -> "_State":
        if before is not None:
            return cls(before["done"], before["ratios"].copy(), before["distortion"].copy())
        ratios = np.full((len(measurement.layers), WEIGHT_BITS + 1), np.nan)
        return cls(0, ratios, measurement.curves.distortion.copy())

    def next(self, kept: Unfinished, advance: Advance) -> "_State":
        """Save the state after one more part and return it."""
        done = self.done + 1
        kept.put({"done": done, "ratios": self.ratios.copy(), "distortion": self.distortion.copy()})
        advance(1)
        return replace(self, done=done)


def runs(measurement: Measurement) -> int:
    """Return the number of perturbations that `anchor` measures."""
    weights = sum(1 for each in measurement.layers for b in each.codes if b <= WEIGHT_BITS)
    return weights + sum(len(each.quantizers) for each in measurement.activations)


def ratio(exact: float, first_order: Float) -> float:
    """Return r, the factor of a layer's curves at one width."""
    total = float(first_order.sum())
    return float(np.clip(exact / total, 1 / _MAX_RATIO, _MAX_RATIO)) if total > 0 else 1.0


def shrunk(ratios: Float, samples: int) -> Float:
    """Shrink `ratios` [layers, widths], measured on `samples` samples, towards their means; NaN becomes 1."""
    measured = np.isfinite(ratios)
    values = np.where(measured, ratios, 1.0)
    mean = np.where(measured.any(axis=0), (values * measured).sum(axis=0) / np.maximum(measured.sum(axis=0), 1), 1.0)
    share = np.array([noise_share(samples, d) for d in _SPREADS])
    return np.where(measured, values ** (1 - share) * mean**share, 1.0)
