"""Tune the refined allocation by gradients of the output distortion (the wing reconstruction).

Half of the steps are taken at the widths allocated. Then the activations' widths are allocated once more, by curves
around the tuned weights, which have learnt to bear some errors; the other half follows.

The number of steps follows from the work of one, or with --minutes from the time that one takes; the emitted bytes
depend on that number and not on the time, so it is kept with the curves and reported.
"""

import hashlib
import time
from dataclasses import replace

import numpy as np

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_activations
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Budgets, Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.emission.quantized_model import chosen_weights
from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.external import is_huge
from rdoq_onnx.reconstruction.training import Recipe, Trainer
from rdoq_onnx.reconstruction.tune import Tuning, briefly_tuned, tuned
from rdoq_onnx.reconstruction.work import default_steps
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.reround import remeasured
from rdoq_onnx.refinement.trial import Trial, significantly_worse, tolerable
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

TUNING = "tuning"
_TIMED = 3  # steps that are timed
_RESERVED = 0.1  # share of --minutes for what follows


def jointly_tuned(start: Trial, samples: Samples, judge: Judge, config: Config, steps: Steps) -> Trial | None:
    """Return the tuned trial, `start` if nothing was gained; None if there are no steps to take."""
    allocation, runtime = start.allocation, judge.runtime
    if is_huge(allocation.measurement.network.model):
        return None
    count = steps.once("number of steps", lambda: number_of_steps(allocation, samples, config, runtime, steps))
    steps.progress.note(f"tuning: {count} steps")
    if not count:
        return None

    def judged(tried: Allocation) -> float:
        """Measure δ; infinite if the guard's rises beyond noise, as then the trial is not kept."""
        trial = Trial.of(tried, judge)
        return trial.distortion if tolerable(start, trial) else float("inf")

    tuning = Tuning(samples, runtime, judged, count, config.seed, lambda done: None)
    try:
        with steps.progress.step(TUNING, count + (2 + tuning.images) * tuning.trial) as advance:
            return _in_two_stages(start, replace(tuning, advance=advance), judge, config, steps)
    except ModelError as error:  # an adjoint that ONNX Runtime rejects, or too little memory
        steps.progress.note(f"not tuned: {error}")
        return None


def _in_two_stages(start: Trial, tuning: Tuning, judge: Judge, config: Config, steps: Steps) -> Trial:
    """Tune, allocate the activations again, and tune again."""

    def stage(before: Trial, count: int) -> Trial:
        kept = steps.unfinished(f"{TUNING} {_identity(before.allocation)}, {count} steps")
        found = tuned(before.allocation, replace(tuning, steps=count, kept=kept))
        return before if found is before.allocation else Trial.of(found, judge)

    name = f"{TUNING} {_identity(start.allocation)}, recipe"
    moved, inside = steps.once(name, lambda: _recipe(start.allocation, tuning, judge))
    tuning = replace(tuning, recipe=replace(tuning.recipe, moved=moved, inside=inside))
    first = stage(start, tuning.steps // 2)
    with workers(config.threads) as pool:
        around = remeasured(first.allocation, config.seed, tuning.samples, judge.runtime, pool).curves
    again = Trial.of(_allocated_again(start.allocation, first.allocation, around, config.budgets), judge)
    better = again.distortion < first.distortion and tolerable(start, again)
    return stage(again if better else first, tuning.steps - tuning.steps // 2)


def _recipe(start: Allocation, tuning: Tuning, judge: Judge) -> tuple[bool, float]:
    """Choose by short trials whether images are augmented, and the weight of tensors inside the network in the loss.

    Few steps show little of what both gain later, so each is left out only if that is surely better.
    """

    def tried(recipe: Recipe) -> Trial:
        return Trial.of(briefly_tuned(start, replace(tuning, recipe=recipe)), judge)

    chosen = replace(tuning.recipe, moved=tuning.images)
    best = tried(chosen)
    for left_out in ({"moved": False}, {"inside": 0.0}):
        recipe = replace(chosen, **left_out)
        if recipe != chosen and significantly_worse(best.errors, (trial := tried(recipe)).errors):
            chosen, best = recipe, trial
    return chosen.moved, chosen.inside


def _allocated_again(start: Allocation, tuned: Allocation, curves: Curves, budgets: Budgets) -> Allocation:
    """Allocate the activations' widths again; a quantizer of another width moves as tuning moved that of the first."""
    result = allocate_activations(tuned, curves, budgets)
    for k, (old, new) in enumerate(zip(tuned.activation_bits, result.activation_bits, strict=True)):
        if old != new:
            now = tuned.measurement.activations[k].quantizers
            moved = now[old].scale / start.measurement.activations[k].quantizers[old].scale
            scale = float(np.float32(now[new].scale * moved))
            result = result.with_quantizer(k, replace(now[new], scale=scale))
    return result


def number_of_steps(allocation: Allocation, samples: Samples, config: Config, runtime: Runtime, steps: Steps) -> int:
    """Return how many steps the work of one allows, or what is left of --minutes."""
    if config.minutes is None:
        return default_steps(allocation.measurement.network, allocation.measurement.observation)
    left = 60 * config.minutes * (1 - _RESERVED) - sum(steps.progress.seconds.values())
    trainer = Trainer.of(allocation, samples, runtime, Recipe(), config.seed)
    trainer.step(0, _TIMED + 1)
    begin = time.perf_counter()
    for number in range(_TIMED):
        trainer.step(number + 1, _TIMED + 1)
    return max(0, int(left * _TIMED / (time.perf_counter() - begin)))


def _identity(allocation: Allocation) -> str:
    """Return a hash of what is tuned."""
    state = hashlib.sha256()
    for bits, (_, codes, shift) in zip(allocation.layer_bits, chosen_weights(allocation), strict=True):
        for array in (bits, codes.integers, codes.scales, shift):
            state.update(array.tobytes())
    for each, width in zip(allocation.measurement.activations, allocation.activation_bits, strict=True):
        state.update(repr(each.quantizers[width]).encode())
    return state.hexdigest()[:16]
