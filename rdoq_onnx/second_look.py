"""After a first allocation: try what curves cannot tell, and keep what lowers the real distortion.

Every trial is emitted and run in ONNX Runtime on samples that rounding was not fitted to. A trial that does not lower
the measured distortion leaves everything as it was, so no step makes the result worse than the step before.

- swaps: the curves of one layer or activation count more or less, and widths are allocated anew; bits move between
  groups, and the budgets hold.
- re-round: the layers in order, a portion at a time, rounded again under the moments of the network quantized so far.
- re-measure: curves around the network with its weights quantized, in place of those around the float network.
- clips: the range of one activation's quantizer a little further in or out.
- re-fit: scale and bias of each output channel, the layers in order, a portion at a time (refitting.py).
- uniform: one width for all, the widest within the budgets. Mixed precision must not lose to it silently.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.budget import Allocation, allocate_bits, uniform_bits
from rdoq_onnx.config import Config, Effort
from rdoq_onnx.distortion import Metric
from rdoq_onnx.emission import quantized_model
from rdoq_onnx.observation import with_outputs
from rdoq_onnx.parallel import Workers
from rdoq_onnx.progress import Advance
from rdoq_onnx.quantizer import Affine, refined
from rdoq_onnx.refitting import refitted
from rdoq_onnx.rerounding import remeasured, rerounded
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples

_WEIGHS = (1.8, 0.55)  # what a group's curves count, relative to what they count now
# For each effort: portions re-rounded, rounds of swaps, groups in each, activations clipped anew, portions re-fitted.
_TRIALS = {"fast": (0, 0, 0, 0, 0), "default": (0, 1, 12, 0, 24), "best": (6, 3, 40, 80, 80)}
_FITTING = 128  # samples that scale and bias are fitted on
_WORK = 8e10  # elements that the trials of swaps may compute, and those of clips: some minutes
_CLIPS = 4  # trials for an activation, on average
_ENOUGH = 0.998  # share of the distortion that a trial must fall to: less is noise


@dataclass(frozen=True)
class Step:
    """What one step did, in distortion measured on the trial samples: before it, after it, and of its last trial."""

    name: str
    before: float
    after: float
    tried: float


@dataclass(frozen=True)
class Plan:
    """How many trials to make, at most.

    portions: of the layers, in which they are rounded again and curves are measured again after; 0 for neither.
    rounds, groups: how often swaps are tried, and in how many layers and activations each time. clips: activations
    whose range is tried anew. fits: portions of the layers, in which scale and bias are fitted.
    """

    portions: int
    rounds: int
    groups: int
    clips: int
    fits: int

    @classmethod
    def of(cls, effort: Effort, allocation: Allocation, judging: int) -> "Plan":
        """What `effort` asks for where each trial runs `judging` samples; fewer swaps on networks of much work."""
        work = judging * sum(allocation.measurement.observation.sizes.values())
        units = len(_groups(allocation))
        return cls.within(effort, work, units, len(allocation.activation_bits), len(allocation.layer_bits))

    @classmethod
    def within(cls, effort: Effort, work: int, units: int, activations: int, layers: int) -> "Plan":
        """The same from what a trial computes, in elements, and from what may be swapped, clipped and fitted."""
        portions, rounds, groups, clips, fits = _TRIALS[effort]
        swaps = max(1, int(_WORK / (work * len(_WEIGHS))))
        groups = min(groups, swaps, units)
        rounds = min(rounds, swaps // groups) if groups else 0
        clips = min(clips, int(_WORK / (work * _CLIPS)), activations)
        return cls(portions, rounds, groups, clips, min(fits, layers))

    @property
    def trials(self) -> int:
        """All of them, with the measurement of what is there and the trial of uniform widths."""
        around = self.portions + 1 if self.portions else 0
        return 2 + around + self.rounds * self.groups * len(_WEIGHS) + 2 * _CLIPS * self.clips + self.fits


@dataclass(frozen=True)
class Judge:
    """Measures what is emitted, on `samples`, `size` at a time, against the float network's outputs `targets`."""

    samples: Samples
    size: int
    targets: tuple[list[NDArray[Any]], ...]
    metric: Metric
    runtime: Runtime

    @classmethod
    def of(cls, model: onnx.ModelProto, samples: Samples, metric: Metric, runtime: Runtime, size: int) -> "Judge":
        session = runtime.session(model, "all")
        targets = tuple(session.run(feeds, metric.outputs) for feeds in samples.batches(size))
        return cls(samples, size, targets, metric, runtime)

    def distortion(self, allocation: Allocation) -> float:
        """δ of the emitted model."""
        session = self.runtime.session(with_outputs(quantized_model(allocation), self.metric.outputs), "all")
        total = sum(
            float(self.metric.errors(session.run(feeds, self.metric.outputs), target, n).sum())
            for (n, feeds), target in zip(self.samples.counted_batches(self.size), self.targets, strict=True)
        )
        return total / len(self.samples)


def second_look(
    allocation: Allocation,
    config: Config,
    plan: Plan,
    judge: Judge,
    fitting: Samples,
    measuring: Samples,
    workers: Workers,
    advance: Advance,
) -> tuple[Allocation, tuple[Step, ...]]:
    """The best of `allocation` and what the steps of the module's docstring make of it, with what each gained."""
    look = _Look(allocation, judge.distortion(allocation), judge, advance)
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
    for portion in np.array_split(np.arange(len(allocation.layer_bits)), plan.fits) if plan.fits else ():
        look.step("re-fit", refitted(look.allocation, portion, fitting.some(_FITTING), runtime))
    return look.allocation, look.steps


class _Look:
    """The best allocation so far, with its distortion."""

    def __init__(self, allocation: Allocation, distortion: float, judge: Judge, advance: Advance) -> None:
        self.allocation, self.distortion = allocation, distortion
        self._judge, self._advance = judge, advance
        self._steps: dict[str, Step] = {}
        advance(1)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps.values())

    def step(self, name: str, trial: Allocation) -> bool:
        """Keep `trial` if it lowers the distortion."""
        before = self.distortion
        found = self._judge.distortion(trial)
        self._advance(1)
        better = found < _ENOUGH * before
        if better:
            self.allocation, self.distortion = trial, found
        first = self._steps.get(name, Step(name, before, before, found))
        self._steps[name] = replace(first, after=self.distortion, tried=found)
        return better

    def swap(self, config: Config, plan: Plan) -> None:
        """Move bits between layers and activations, those of most distortion first."""
        measurement = self.allocation.measurement
        weigh = np.ones(len(measurement.curves.elements))
        for _ in range(plan.rounds):
            improved = False
            for rows in _groups(self.allocation)[: plan.groups]:
                for factor in _WEIGHS:
                    tried = weigh.copy()
                    tried[rows] *= factor
                    trial = allocate_bits(measurement, config, tried)
                    if not _same(trial, self.allocation) and self.step("swaps", trial):
                        weigh, improved = tried, True
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
            for other in refined(chosen, *measurement.observation.ranges[tensor])[1:]:
                if self.step("clips", _with_quantizer(self.allocation, int(k), other)):
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
