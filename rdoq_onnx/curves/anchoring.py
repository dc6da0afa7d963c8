"""First-order curves tied to the truth at low widths, where perturbations are too large for a first order.

Two cheap exact measurements: a whole layer at one width is one run, and so is an activation under one quantizer. The
curves of a layer's channels at a width are scaled by r, the layer's exact δ over their sum (which holds what channels
of one layer do to each other, too); an activation's δ is replaced.

On n samples r is off by a share of √(2 / n), for what channels do to each other differs from sample to sample. It is
drawn towards its mean over the layers, r̄, as far as that goes against how much layers truly differ, d:

    log r ← (1 - s) log r + s log r̄,    s = (2 / n) / (2 / n + d²).
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import judging, split
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.curves.shrinkage import noise_share
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

WEIGHT_BITS = 3  # the widest weights that are tied
# d at 0 to 3 bits: the standard deviation of log r over layers, where networks were measured on many samples.
_DIFFER = (0.7, 0.5, 0.2, 0.1)
_MAX_RATIO = 8.0  # a measured ratio beyond reflects the few samples, not the layer


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
    ratios = np.full((len(measurement.network.layers), WEIGHT_BITS + 1), np.nan)
    if (before := unfinished.get()) is not None:
        tied, ratios, distortion = before["tied"], before["ratios"].copy(), before["distortion"].copy()
        advance(tied)

    def done() -> None:
        nonlocal tied
        tied += 1
        unfinished.put({"tied": tied, "ratios": ratios.copy(), "distortion": distortion.copy()})
        advance(1)

    layers = list(zip(
        measurement.network.layers, measurement.unit_rows(), measurement.codes, measurement.means, strict=True
    ))  # fmt: skip
    for k, (layer, rows, codes, mean) in enumerate(layers[tied:], tied):
        low = {b: c for b, c in codes.items() if b <= WEIGHT_BITS}
        if low and not any(u.output in measurement.probed for u in layer.uses):
            exact = weights.whole_layer(layer, list(low.values()), mean)
            ratios[k, list(low)] = [ratio(e, distortion[rows, b]) for b, e in zip(low, exact, strict=True)]
        done()
    tables = zip(measurement.network.activations, measurement.quantizers, strict=True)
    untied = list(enumerate(tables, measurement.channels))[max(tied - len(layers), 0) :]
    for row, (activation, table) in untied:
        distortion[row, list(table)] = activations.activation(activation, list(table.values()))
        done()
    for rows, factors in zip(measurement.unit_rows(), drawn(ratios, len(weights.samples)), strict=True):
        distortion[rows, : WEIGHT_BITS + 1] *= factors
    return replace(measurement, curves=replace(measurement.curves, distortion=distortion))


def runs(measurement: Measurement) -> int:
    """How many perturbations `tie` measures."""
    weights = sum(1 for codes in measurement.codes for b in codes if b <= WEIGHT_BITS)
    return weights + sum(len(table) for table in measurement.quantizers)


def ratio(exact: float, first_order: NDArray[np.float64]) -> float:
    """What a layer's curves are multiplied by."""
    total = float(first_order.sum())
    return float(np.clip(exact / total, 1 / _MAX_RATIO, _MAX_RATIO)) if total > 0 else 1.0


def drawn(ratios: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """`ratios` [layers, widths] of so many samples drawn towards those of all layers; 1 where there is none (NaN)."""
    known = np.isfinite(ratios)
    found = np.where(known, ratios, 1.0)
    mean = np.where(known.any(axis=0), (found * known).sum(axis=0) / np.maximum(known.sum(axis=0), 1), 1.0)
    share = np.array([noise_share(samples, d) for d in _DIFFER])
    return np.where(known, found ** (1 - share) * mean**share, 1.0)


TYING = (8, 32)  # samples of exact measurements, at least and at most
TYING_WORK = {"fast": 0.0, "default": 3e10, "best": 1e11}  # elements that they may compute; larger networks go without


def tied(measurement: Measurement, config: Config, samples: Samples, runtime: Runtime, steps: Steps) -> Measurement:
    """`measurement` with its curves tied to exact measurements where the effort allows."""
    work = runs(measurement) * sum(measurement.observation.sizes.values())  # of one sample
    affordable = min(int(TYING_WORK[config.effort] / work), TYING[1])
    if config.measure == "probe" or affordable < TYING[0]:
        return measurement
    observation = measurement.observation
    weights, activations = (
        Prober(measurement.aimed, tying.some(affordable), observation.metric, runtime, observation.batching)
        for tying in (split(samples, config.seed)[1], judging(samples, config.seed))
    )
    parts = len(measurement.network.layers) + len(measurement.network.activations)
    so_far = steps.unfinished("ties")
    with workers(config.threads):  # which keeps BLAS to one thread, too
        curves = steps.step("ties", parts, lambda advance: tie(
            measurement, weights, activations, advance, so_far
        ).curves)  # fmt: skip
    return replace(measurement, curves=curves)
