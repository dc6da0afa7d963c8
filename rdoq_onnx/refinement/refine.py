"""Refine a first allocation: try changes that curves cannot price, and keep those that lower the measured distortion.

Every trial is emitted and run in ONNX Runtime on samples that rounding was not fitted to. A trial that does not lower
the measured distortion is dropped, so no step makes the result worse. The best of many trials is also the luckiest:
bit swaps and clipping are kept only if they gain at least twice the standard error of the difference.

- first order: allocate by curves that are not anchored to exact runs (curves/anchoring.py). Beyond some perturbation
  a layer's own exact error tells less of the sum than first order does; what follows uses the better curves.
- bit swaps: weight the curves of one layer or activation more or less and allocate again; bits move between groups,
  and the budgets hold.
- re-rounding: round the layers again in order, a portion at a time, under the moments of the network quantized so far.
- re-measuring: replace curves around the float network by curves around the network with quantized weights.
- clipping: move the range of one activation's quantizer slightly in or out.
- scale refit: fit scale and bias of each output channel, layers in order (affine_correction.py).
- diversion: bits move towards the divergence of rows of logits, where "auto" weighs it (diversion.py). Then, and for
  such models in all other trials, the divergence must not rise when the squared error falls.
- tuning: integers, scales, biases and quantizers together, by gradients of the distortion (joint_tuning.py).
- uniform: one width everywhere, the widest within the budgets. Mixed precision must not lose to it silently.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, allocate_near, uniform_bits
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.candidates.activations import refined
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measurement import with_curves
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.refinement.affine_correction import Fitting, fitted_layers, refitted
from rdoq_onnx.refinement.diversion import Diverted, diverted
from rdoq_onnx.refinement.joint_tuning import TUNING, jointly_tuned
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.plan import WEIGHS, Plan, rows_by_distortion
from rdoq_onnx.refinement.reround import remeasured, rerounded
from rdoq_onnx.refinement.trial import SURE, Trial, better, significantly_worse, surely_diverted
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers, workers

PARTS = "widths near one another, for the sake of each part"
_DISTANCES = (2, 1)  # from one width everywhere, in bits


@dataclass(frozen=True)
class Step:
    """Distortion on the judging samples before and after one kind of trial, and of the last such trial."""

    name: str
    before: float
    after: float
    tried: float


@dataclass(frozen=True)
class Refined:
    """A refined allocation, its `quantized_model`, and the steps that led to it. diverted: None if no bits were."""

    allocation: Allocation
    model: onnx.ModelProto
    steps: tuple[Step, ...] = ()
    diverted: Diverted | None = None


@dataclass(frozen=True)
class Refinement:
    """What all trials share. kept: keeps results that no allocation changes for the next refinement; None for none."""

    config: Config
    plan: Plan
    judge: Judge
    split: SampleSplit
    workers: Workers
    advance: Advance
    kept: Steps | None = None

    def of(self, allocation: Allocation) -> Refined:
        """Refine `allocation` by the steps in the module's docstring, recording the gain of each."""
        best = _Best(allocation, self.judge, self.advance)
        if allocation.measurement.unanchored is not None:
            by_first_order = with_curves(allocation.measurement, allocation.measurement.unanchored)
            best.step("first order", allocate_bits(by_first_order, self.config.budgets))
        if self.plan.portions:
            self._reround(best)
        weigh, gained = best.divert(self.config)
        best.swap(self.config, self.plan, weigh)
        best.clip(self.plan)
        uniform = uniform_bits(best.allocation.measurement, self.config.budgets)
        if uniform is not None:
            trial = best.tried(uniform)
            best.keep("uniform", trial)
            best.protect(trial, self.config)
        self._fit(best)
        return Refined(best.allocation, best.model, best.steps, gained)

    def _reround(self, best: "_Best") -> None:
        runtime = self.judge.runtime
        for portion in np.array_split(np.arange(len(best.allocation.measurement.network.layers)), self.plan.portions):
            best.step("re-rounding", rerounded(best.allocation, portion, self.split.fitting, runtime, self.workers))
        around = remeasured(best.allocation, self.config.seed, self.split.measuring, runtime, self.workers)
        best.step("re-measuring", allocate_bits(around, self.config.budgets))

    def _fit(self, best: "_Best") -> None:
        before, model = best.allocation, best.model
        fitting = Fitting(self.split.fitting, self.judge.runtime, self.workers)
        kept = self.kept if len(self.plan.fits) == 1 else None
        for share in self.plan.fits:
            best.step("scale refit", refitted(before, model, fitted_layers(before, share), replace(fitting, kept=kept)))
        for k in fitted_layers(before, 1.0)[: self.plan.alone]:
            best.step("scale refit", refitted(best.allocation, best.model, [k], fitting))


def refine(allocation: Allocation, config: Config, split: SampleSplit, runtime: Runtime, steps: Steps) -> Refined:
    """Refine `allocation` as far as the effort allows, judged on samples that rounding was not fitted to."""
    if not allocation.layer_bits:
        return Refined(allocation, quantized_model(allocation))
    judge = Judge.of(allocation.measurement, split.measuring, runtime, steps)
    if config.distortion == "auto":
        judge = replace(judge, guard=judge.metric.divergence)
    plan = Plan.of(config.effort, allocation, len(judge.samples))
    with steps.progress.step("second look", plan.trials) as advance, workers(config.threads) as pool:
        refined = Refinement(config, plan, judge, split, pool, advance, steps).of(allocation)
    return refined if config.effort != "best" else _with_tuning(refined, judge, split, config, steps)


def _with_tuning(refined: Refined, judge: Judge, split: SampleSplit, config: Config, steps: Steps) -> Refined:
    """Tune what was refined by gradients; that is kept only if it is better."""
    before = Trial.of(refined.allocation, judge)
    after = jointly_tuned(before, split.fitting, judge, config, steps)
    if after is None:
        return refined
    step = Step(TUNING, before.distortion, after.distortion, after.distortion)
    return replace(refined, allocation=after.allocation, model=after.model, steps=(*refined.steps, step))


class _Best:
    """The best trial so far, and the steps that led to it."""

    def __init__(self, allocation: Allocation, judge: Judge, advance: Advance) -> None:
        self._judge, self._advance = judge, advance
        self._steps: dict[str, Step] = {}
        self._trial = self.tried(allocation)

    @property
    def allocation(self) -> Allocation:
        return self._trial.allocation

    @property
    def model(self) -> onnx.ModelProto:
        return self._trial.model

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps.values())

    def step(self, name: str, trial: Allocation, sure: float = 0.0) -> bool:
        """Try `trial`; `keep` it if it is better, and return whether it is."""
        return self.keep(name, self.tried(trial), sure)

    def tried(self, allocation: Allocation) -> Trial:
        trial = Trial.of(allocation, self._judge)
        self._advance(1)
        return trial

    def keep(self, name: str, trial: Trial, sure: float = 0.0) -> bool:
        """Keep `trial` if it lowers the distortion by at least `sure` standard errors; return whether it did."""
        before, tried = self._trial.distortion, trial.distortion
        if gained := better(self._trial, trial, sure):
            self._trial = trial
        first = self._steps.get(name, Step(name, before, before, tried))
        self._steps[name] = replace(first, after=self._trial.distortion, tried=tried)
        return gained

    def divert(self, config: Config) -> tuple[NDArray[np.float64], Diverted | None]:
        """Divert bits towards the divergence if that gains surely and costs little; return the weights of the rows."""
        before, divergence = self._trial, self.allocation.measurement.divergence
        weigh = np.ones(len(self.allocation.measurement.curves.elements))
        if divergence is None or config.sqnr is not None:
            return weigh, None
        allocation, tried = diverted(before.allocation, divergence, config.budgets)
        gained = surely_diverted(before, trial := self.tried(allocation))
        if gained is None:
            return weigh, None
        self._trial = trial
        return tried, gained

    def protect(self, uniform: Trial, config: Config) -> None:
        """Leave no part of the outputs worse than `uniform` widths do: by widths nearer to those, or by themselves."""
        before, errors = self._trial, uniform.errors
        if errors.shape[1] == 1 or not significantly_worse(before.errors, errors):
            return
        near = (
            Trial.of(allocate_near(uniform.allocation, config.budgets, distance), self._judge)
            for distance in _DISTANCES
        )
        self._trial = next((trial for trial in near if not significantly_worse(trial.errors, errors)), uniform)
        after = self._trial.distortion
        self._steps[PARTS] = Step(PARTS, before.distortion, after, after)

    def swap(self, config: Config, plan: Plan, weigh: NDArray[np.float64]) -> None:
        """Move bits between layers and activations, greatest distortion first; weigh: of the rows so far."""
        measurement = self.allocation.measurement
        for _ in range(plan.rounds):
            improved, idle = False, 0
            for rows in rows_by_distortion(self.allocation)[: plan.groups]:
                idle += 1
                for factor in WEIGHS:
                    tried = weigh.copy()
                    tried[rows] *= factor
                    trial = allocate_bits(measurement, config.budgets, tried, self.allocation.bound)
                    if not _same(trial, self.allocation) and self.step("bit swaps", trial, SURE):
                        weigh, improved, idle = tried, True, 0
                        break
                if idle == plan.patience:
                    break
            if not improved:
                return

    def clip(self, plan: Plan) -> None:
        """Move the ends of the activations' ranges, greatest distortion first."""
        measurement, bits = self.allocation.measurement, self.allocation.activation_bits
        distortions = self.allocation.distortions[measurement.channels :]
        for k in np.argsort(-distortions, kind="stable")[: plan.clips]:
            tensor = measurement.network.activations[k].tensor
            chosen = measurement.activations[k].quantizers[bits[k]]
            for other in refined(chosen, *measurement.observation.reach(tensor))[1:]:
                if self.step("clipping", _with_quantizer(self.allocation, int(k), other), SURE):
                    break


def _with_quantizer(allocation: Allocation, k: int, quantizer: Affine) -> Allocation:
    """Replace the quantizer of activation `k` at its width."""
    activations = list(allocation.measurement.activations)
    quantizers = {**activations[k].quantizers, allocation.activation_bits[k]: quantizer}
    activations[k] = replace(activations[k], quantizers=quantizers)
    return replace(allocation, measurement=replace(allocation.measurement, activations=tuple(activations)))


def _same(one: Allocation, other: Allocation) -> bool:
    pairs = zip(one.layer_bits, other.layer_bits, strict=True)
    return one.activation_bits == other.activation_bits and all((a == b).all() for a, b in pairs)
