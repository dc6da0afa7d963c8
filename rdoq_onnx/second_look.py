"""After a first allocation: try what curves cannot tell, and keep what lowers the real distortion.

Every trial is emitted and run in ONNX Runtime on samples that rounding was not fitted to. A trial that does not lower
the measured distortion leaves everything as it was, so no step makes the result worse than the step before. The best of
many trials is the luckiest one, too: swaps and clips are kept only where they lower it by twice the standard error of
the difference.

- swaps: the curves of one layer or activation count more or less, and widths are allocated anew; bits move between
  groups, and the budgets hold.
- re-round: the layers in order, a portion at a time, rounded again under the moments of the network quantized so far.
- re-measure: curves around the network with its weights quantized, in place of those around the float network.
- clips: the range of one activation's quantizer a little further in or out.
- re-fit: scale and bias of each output channel, the layers in order (refitting.py).
- uniform: one width for all, the widest within the budgets. Mixed precision must not lose to it silently.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.budget import Allocation, allocate_bits, uniform_bits
from rdoq_onnx.config import Config, Effort
from rdoq_onnx.curves_file import Steps
from rdoq_onnx.distortion import Metric
from rdoq_onnx.emission import quantized_model
from rdoq_onnx.observation import with_outputs
from rdoq_onnx.parallel import Workers
from rdoq_onnx.progress import Advance
from rdoq_onnx.quantizer import Affine, refined
from rdoq_onnx.refitting import fitted_layers, refitted
from rdoq_onnx.rerounding import remeasured, rerounded
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples

_WEIGHS = (1.8, 0.55)  # what a group's curves count, relative to what they count now
# For each effort: portions re-rounded, rounds of swaps, groups in each, how many of them may gain nothing in a row,
# activations clipped anew, shares of the layers re-fitted, layers re-fitted one by one after that.
_TRIALS: dict[Effort, tuple[int, int, int, int, int, tuple[float, ...], int]] = {
    "fast": (0, 0, 0, 0, 0, (), 0),
    "default": (0, 1, 12, 2, 0, (2 / 3,), 0),
    "best": (6, 3, 40, 40, 80, (1 / 3, 2 / 3, 1.0), 80),
}
_WORK = 8e10  # elements that the trials of swaps may compute, and those of clips: some minutes
_CLIPS = 4  # trials for an activation, on average
_ENOUGH = 0.998  # share of the distortion that a trial must fall to: less is noise
_SURE = 2.0  # standard errors that one of many trials must gain


@dataclass(frozen=True)
class Step:
    """What one step did, in distortion measured on the trial samples: before it, after it, and of its last trial."""

    name: str
    before: float
    after: float
    tried: float


@dataclass(frozen=True)
class Looked:
    """An allocation, its `quantized_model`, and the steps that led to it."""

    allocation: Allocation
    model: onnx.ModelProto
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How many trials to make, at most.

    portions: of the layers, in which they are rounded again and curves are measured again after; 0 for neither.
    rounds, groups: how often swaps are tried, and in how many layers and activations each time; patience: how many of
    these may gain nothing one after another. clips: activations whose range is tried anew. fits: shares of the layers,
    whose scales and biases are fitted; alone: how many of them are then fitted again, each by itself.
    """

    portions: int
    rounds: int
    groups: int
    patience: int
    clips: int
    fits: tuple[float, ...]
    alone: int

    @classmethod
    def of(cls, effort: Effort, allocation: Allocation, judging: int) -> "Plan":
        """What `effort` asks for where each trial runs `judging` samples; fewer swaps on networks of much work."""
        work = judging * sum(allocation.measurement.observation.sizes.values())
        units = len(_groups(allocation))
        return cls.within(effort, work, units, len(allocation.activation_bits), len(allocation.layer_bits))

    @classmethod
    def within(cls, effort: Effort, work: int, units: int, activations: int, layers: int) -> "Plan":
        """The same from what a trial computes, in elements, and from what may be swapped, clipped and fitted."""
        portions, rounds, groups, patience, clips, fits, alone = _TRIALS[effort]
        swaps = max(1, int(_WORK / (work * len(_WEIGHS))))
        groups = min(groups, swaps, units)
        rounds = min(rounds, swaps // groups) if groups else 0
        clips = min(clips, int(_WORK / (work * _CLIPS)), activations)
        return cls(portions, rounds, groups, patience, clips, fits, min(alone, int(_WORK / work), layers))

    @property
    def trials(self) -> int:
        """All of them, with the measurement of what is there and the trial of uniform widths."""
        around = self.portions + 1 if self.portions else 0
        swaps, clips = self.rounds * self.groups * len(_WEIGHS), 2 * _CLIPS * self.clips
        return 2 + around + swaps + clips + len(self.fits) + self.alone


@dataclass(frozen=True)
class Judge:
    """Measures what is emitted, on `samples`, `size` at a time, against the float network's outputs `targets`."""

    samples: Samples
    size: int
    targets: tuple[tuple[NDArray[Any], ...], ...]
    metric: Metric
    runtime: Runtime

    @classmethod
    def of(cls, model: onnx.ModelProto, samples: Samples, metric: Metric, runtime: Runtime, size: int) -> "Judge":
        return cls(samples, size, float_outputs(model, samples, metric, runtime, size), metric, runtime)

    def errors(self, model: onnx.ModelProto) -> NDArray[np.float64]:
        """What each sample adds to δ of a quantized model, [samples]."""
        session = self.runtime.session(with_outputs(model, self.metric.outputs), "all")
        batches = zip(self.samples.counted_batches(self.size), self.targets, strict=True)
        found = [self.metric.errors(session.run(x, self.metric.outputs), target, n) for (n, x), target in batches]
        return np.concatenate(found)

    def distortion(self, allocation: Allocation) -> float:
        """δ of the emitted model."""
        return float(self.errors(quantized_model(allocation)).mean())


def float_outputs(
    model: onnx.ModelProto, samples: Samples, metric: Metric, runtime: Runtime, size: int
) -> tuple[tuple[NDArray[Any], ...], ...]:
    """The outputs that count, of the float `model`, for each batch of `size`."""
    session = runtime.session(model, "all")
    return tuple(tuple(session.run(feeds, metric.outputs)) for feeds in samples.batches(size))


def second_look(
    allocation: Allocation,
    config: Config,
    plan: Plan,
    judge: Judge,
    fitting: Samples,
    measuring: Samples,
    workers: Workers,
    advance: Advance,
    known: Steps | None = None,
) -> Looked:
    """The best of `allocation` and what the steps of the module's docstring make of it, with what each gained.

    known: keeps what no allocation changes.
    """
    look = _Look(allocation, judge, advance)
    runtime = judge.runtime
    if plan.portions:
        for portion in np.array_split(np.arange(len(allocation.layer_bits)), plan.portions):
            look.step("re-round", rerounded(look.allocation, portion, fitting, runtime, workers))
        around = remeasured(look.allocation, config, measuring, runtime, workers)
        look.step("re-measure", allocate_bits(around, config))
    look.swap(config, plan)
    look.clip(plan)
    uniform = uniform_bits(look.allocation.measurement, config)
    if uniform is not None:
        look.step("uniform", uniform)
    before, model = look.allocation, look.model
    for share in plan.fits:
        kept = known if len(plan.fits) == 1 else None
        look.step("re-fit", refitted(before, model, fitted_layers(before, share), fitting, runtime, workers, kept))
    for k in fitted_layers(before, 1.0)[: plan.alone]:
        look.step("re-fit", refitted(look.allocation, look.model, [k], fitting, runtime, workers))
    return Looked(look.allocation, look.model, look.steps)


class _Look:
    """The best allocation so far, with what it becomes and the distortion of that."""

    def __init__(self, allocation: Allocation, judge: Judge, advance: Advance) -> None:
        self.allocation, self.model = allocation, quantized_model(allocation)
        self._errors = judge.errors(self.model)
        self._judge, self._advance = judge, advance
        self._steps: dict[str, Step] = {}
        advance(1)

    @property
    def distortion(self) -> float:
        return float(self._errors.mean())

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps.values())

    def step(self, name: str, trial: Allocation, sure: float = 0.0) -> bool:
        """Keep `trial` if it lowers the distortion, by `sure` standard errors."""
        model = quantized_model(trial)
        before, errors = self.distortion, self._judge.errors(model)
        self._advance(1)
        found, gains = float(errors.mean()), self._errors - errors
        better = found < _ENOUGH * before and before - found >= sure * gains.std() / len(gains) ** 0.5
        if better:
            self.allocation, self.model, self._errors = trial, model, errors
        first = self._steps.get(name, Step(name, before, before, found))
        self._steps[name] = replace(first, after=self.distortion, tried=found)
        return better

    def swap(self, config: Config, plan: Plan) -> None:
        """Move bits between layers and activations, those of most distortion first."""
        measurement = self.allocation.measurement
        weigh = np.ones(len(measurement.curves.elements))
        for _ in range(plan.rounds):
            improved, idle = False, 0
            for rows in _groups(self.allocation)[: plan.groups]:
                idle = idle + 1
                for factor in _WEIGHS:
                    tried = weigh.copy()
                    tried[rows] *= factor
                    trial = allocate_bits(measurement, config, tried, self.allocation.bound)
                    if not _same(trial, self.allocation) and self.step("swaps", trial, _SURE):
                        weigh, improved, idle = tried, True, 0
                        break
                if idle == plan.patience:
                    break
            if not improved:
                return

    def clip(self, plan: Plan) -> None:
        """Move the ends of the activations' ranges, those of most distortion first."""
        measurement, bits = self.allocation.measurement, self.allocation.activation_bits
        taken = self.allocation.distortions[measurement.channels :]
        for k in np.argsort(-taken, kind="stable")[: plan.clips]:
            tensor = measurement.network.activations[k].tensor
            chosen = measurement.quantizers[k][bits[k]]
            for other in refined(chosen, *measurement.observation.reach(tensor))[1:]:
                if self.step("clips", _with_quantizer(self.allocation, int(k), other), _SURE):
                    break


def _with_quantizer(allocation: Allocation, k: int, quantizer: Affine) -> Allocation:
    """`allocation` with another quantizer for activation `k`, at its width."""
    tables = list(allocation.measurement.quantizers)
    tables[k] = {**tables[k], allocation.activation_bits[k]: quantizer}
    return replace(allocation, measurement=replace(allocation.measurement, quantizers=tuple(tables)))


def _groups(allocation: Allocation) -> list[slice]:
    """The rows of each layer and each activation within a budget, in the order of the distortion that they take."""
    measurement = allocation.measurement
    first = measurement.channels
    rows = measurement.unit_rows()
    rows += [slice(first + k, first + k + 1) for k, a in enumerate(measurement.network.activations) if not a.fusion]
    taken = allocation.distortions
    return sorted(rows, key=lambda r: -float(taken[r].sum()))


def _same(one: Allocation, other: Allocation) -> bool:
    pairs = zip(one.layer_bits, other.layer_bits, strict=True)
    return one.activation_bits == other.activation_bits and all((a == b).all() for a, b in pairs)
