"""Tune an allocation's integers, scales, biases and quantizers together, and keep the best of several moments.

The variables are judged after each of `ROUNDS` rounds of steps, on samples that no step has seen, and the best values
are kept. The rates of learning fall to 0 with the last round, so there is nothing to wait for after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.calibration.augmentation import is_image
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.reconstruction.training import DEFAULT, Recipe, Trainer
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime

ROUNDS = 8
_TRIAL = 16  # a trial takes 1 / _TRIAL of the steps


@dataclass(frozen=True)
class Tuning:
    """The means to tune.

    samples: those that rounding is fitted to. judged: measures the distortion of an allocation. steps: of gradient
    descent. kept: keeps what a run that is interrupted has reached.
    """

    samples: Samples
    runtime: Runtime
    judged: Callable[[Allocation], float]
    steps: int
    seed: int
    advance: Advance
    kept: Unfinished = field(default_factory=Unfinished)
    recipe: Recipe = DEFAULT

    @property
    def images(self) -> bool:
        """Whether samples are images, which can be augmented."""
        return is_image(self.samples.feeds(slice(0, self.samples.batch or 1)))

    @property
    def trial(self) -> int:
        """The steps of `briefly_tuned`."""
        return max(self.steps // _TRIAL, 1)


def tuned(allocation: Allocation, tuning: Tuning) -> Allocation:
    """Return the best allocation found by tuning `allocation`, `allocation` itself if none is better."""
    trainer = Trainer.of(allocation, tuning.samples, tuning.runtime, tuning.recipe, tuning.seed)
    if not trainer.reached:
        return allocation
    state = _trained(trainer, tuning, tuning.kept.get() or {"round": 0})
    if state.get("best") is None:
        return allocation
    trainer.variables.restore(state["best"])
    return trainer.variables.tuned()


def _trained(trainer: Trainer, tuning: Tuning, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run the rounds that `state` has not seen, and return the last state."""
    variables, adam = trainer.variables, trainer.adam
    if state["round"] == ROUNDS:
        tuning.advance(tuning.steps)
        return state
    if "values" in state:
        variables.restore(state["values"])
        for array, value in zip((*adam.means, *adam.squares), state["moments"], strict=True):
            array[...] = value
    else:
        state = {**state, "best": None, "least": tuning.judged(variables.allocation)}
    edges = [k * tuning.steps // ROUNDS for k in range(ROUNDS + 1)]
    tuning.advance(edges[state["round"]])
    for number in range(state["round"], ROUNDS):
        for step in range(edges[number], edges[number + 1]):
            trainer.step(step, tuning.steps)
            tuning.advance(1)
        distortion, values = tuning.judged(variables.tuned()), variables.values()
        if distortion < state["least"]:
            state = {**state, "best": values, "least": distortion}
        moments = tuple(x.copy() for x in (*adam.means, *adam.squares))
        state = {**state, "round": number + 1, "values": values, "moments": moments}
        tuning.kept.put(state)
    state = {name: value for name, value in state.items() if name not in ("values", "moments")}  # large, and used up
    tuning.kept.put(state)
    return state


def briefly_tuned(allocation: Allocation, tuning: Tuning) -> Allocation:
    """Return what some steps make of `allocation`."""
    trainer = Trainer.of(allocation, tuning.samples, tuning.runtime, tuning.recipe, tuning.seed)
    for step in range(tuning.trial):
        trainer.step(step, tuning.trial)
        tuning.advance(1)
    return trainer.variables.tuned()
