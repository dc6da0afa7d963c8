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
- ridge: fit weights to the inputs of the network quantized so far by ridge regression, and round them (ridge.py).
- diversion: bits move towards the divergence of rows of logits, where "auto" weighs it (diversion.py). Then, and for
  such models in all other trials, the divergence must not rise when the squared error falls.
- tuning: integers, scales, biases and quantizers together, by gradients of the distortion (joint_tuning.py).
- uniform: one width everywhere, the widest within the budgets. Mixed precision must not lose to it silently.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.divergence import second_metric
from rdoq_onnx.curves.measurement import with_curves
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.refinement.affine_correction import Fitting, fitted_layers, refitted
from rdoq_onnx.refinement.best import Best, Step
from rdoq_onnx.refinement.diversion import Diverted
from rdoq_onnx.refinement.joint_tuning import TUNING, jointly_tuned
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.lookahead import worth
from rdoq_onnx.refinement.plan import Plan
from rdoq_onnx.refinement.reround import remeasured, rerounded
from rdoq_onnx.refinement.trial import Trial
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.summation import here
from rdoq_onnx.system.threads import Workers, workers

_LITTLE = 10**-1.5  # of the outputs' power: ridge regression regains nothing of less


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
        compute = self.workers.sums.compute if worth(allocation, self.judge) else here
        best = Best(allocation, self.judge, self.advance, compute)
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
        if self.config.effort == "best" or best.loses(_LITTLE):
            self._ridge(best)
        return Refined(best.allocation, best.model, best.steps, gained)

    def _reround(self, best: Best) -> None:
        runtime = self.judge.runtime
        for portion in np.array_split(np.arange(len(best.allocation.measurement.network.layers)), self.plan.portions):
            best.step("re-rounding", rerounded(best.allocation, portion, self.split.fitting, runtime, self.workers))
        around = remeasured(best.allocation, self.config.seed, self.split.measuring, runtime, self.workers)
        best.step("re-measuring", allocate_bits(around, self.config.budgets))

    def _ridge(self, best: Best) -> None:
        layers, count = np.arange(len(best.allocation.measurement.network.layers)), self.plan.ridges
        fitting, runtime = self.split.fitting, self.judge.runtime

        def fitted(portions: Sequence[NDArray[np.int64]]) -> Iterator[tuple[int, Allocation]]:
            before = best.allocation
            for n, portion in enumerate(portions):
                yield n, rerounded(before, portion, fitting, runtime, self.workers, ridged=True)

        best.one_by_one("ridge", np.array_split(layers, count) if count else [], fitted)

    def _fit(self, best: Best) -> None:
        before, model = best.allocation, best.model
        fitting = Fitting(self.split.fitting, self.judge.runtime, self.workers)
        kept = self.kept if len(self.plan.fits) == 1 else None
        for share in self.plan.fits:
            best.step("scale refit", refitted(before, model, fitted_layers(before, share), replace(fitting, kept=kept)))
        layers = fitted_layers(before, 1.0)[: self.plan.alone]
        best.one_by_one("scale refit", layers, partial(_refitted_alone, best, fitting))


def refine(allocation: Allocation, config: Config, split: SampleSplit, runtime: Runtime, steps: Steps) -> Refined:
    """Refine `allocation` as far as the effort allows, judged on samples that rounding was not fitted to."""
    if not allocation.layer_bits:
        return Refined(allocation, quantized_model(allocation))
    judge = Judge.of(allocation.measurement, split.measuring, runtime, steps)
    judge = replace(judge, guard=second_metric(judge.metric, config))
    plan = Plan.of(config.effort, allocation, len(judge.samples))
    with (
        steps.progress.step("second look", plan.trials) as advance,
        workers(config.threads, steps.unsharded()) as pool,
    ):
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


def _refitted_alone(best: Best, fitting: Fitting, layers: Sequence[int]) -> Iterator[tuple[int, Allocation]]:
    """Yield the index in `layers`, and the allocation with that layer alone refitted."""
    allocation, model = best.allocation, best.model
    for n, k in enumerate(layers):
        yield n, refitted(allocation, model, [k], fitting)
