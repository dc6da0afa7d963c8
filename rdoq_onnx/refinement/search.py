"""Find the fewest bits, or the least cost, that reach a goal: output SQNR or agreement of the top class.

Budgets are bisected on a grid, by what the curves' allocations reach on `search` samples. What holds is decided on
`proof` samples, by a one-sided 95 % bound (observation/confidence.py): from the widest budget down to the one found,
and below it as long as refinement makes up for the bits, until the bound fails for the first time. In that fixed order
the last budget that passes holds with 95 %, however many were tried.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.errors import BudgetError, ConfigError
from rdoq_onnx.observation.confidence import share_bound, share_needed, sqnr_needed
from rdoq_onnx.refinement.budget_grid import STEP, Grid
from rdoq_onnx.refinement.reference import Reference, classifies
from rdoq_onnx.refinement.refine import Refined

_REFINEMENTS = 4  # at most
_SPENT = 0.8  # share of the dB to spare that the next budget should take, by the curves
_MOST_DB = 100.0
_FEWER_BITS = 0.25  # of the next budget where the goal is no SQNR
_RUNGS = (32, 16, 8, 4, 2, 1)  # steps above the budget found at which the bound is tried, too

Refine = Callable[[Allocation, Config], Refined]


@dataclass(frozen=True)
class Proof:
    """What a model reaches, in the goal's unit, the bound of it, and how many samples the bound is of.

    needed: about how many would prove the goal, if they are like these; None if no number would.
    """

    reached: float
    bound: float
    samples: int
    needed: int | None


@dataclass(frozen=True)
class Goal:
    """A goal set by `option`: at least `least` dB or percent. search, proof: the samples of the module's docstring."""

    option: str
    least: float
    search: Reference
    proof: Reference

    @classmethod
    def of(cls, config: Config, search: Reference, proof: Reference) -> "Goal | None":
        """Return the goal of `config`, if any.

        Raises ConfigError for --top1-agreement unless the model outputs one row of scores per sample, BudgetError if
        there are too few samples to prove it whatever the bits.
        """
        if config.sqnr is not None:
            return cls("--sqnr", config.sqnr, search, proof)
        if config.top1_agreement is None:
            return None
        if not classifies(proof):
            raise ConfigError(
                "--top1-agreement: the model does not give one row of scores per sample and nothing else; use --sqnr"
            )
        goal = cls("--top1-agreement", config.top1_agreement, search, proof)
        count, needed = len(proof.samples), share_needed(goal.least / 100)
        if (best := 100 * share_bound(count, count)) < goal.least:
            fix = f"give {needed} with --validation" if needed else "no number of samples proves it"
            raise BudgetError(
                f"{goal.option} {goal.least:g}: {count} samples without a miss prove only "
                f"{best:.1f} %; {fix}, or ask for less"
            )
        return goal

    @property
    def unit(self) -> str:
        return "dB" if self.option == "--sqnr" else "%"

    def estimate(self, model: onnx.ModelProto) -> float:
        """Measure a quantized model on the search samples, in the goal's unit."""
        if self.option == "--sqnr":
            return min(self.search.powers(model).sqnr_db)
        return 100 * self.search.agreement(model).share

    def prove(self, model: onnx.ModelProto) -> Proof:
        """Measure a quantized model on the proof samples."""
        if self.option == "--sqnr":
            powers = self.proof.powers(model)
            worst = int(np.argmin(powers.bounds_db))
            needed = sqnr_needed(powers.signal[:, worst], powers.noise[:, worst], self.least)
            return Proof(powers.sqnr_db[worst], powers.bounds_db[worst], len(powers.signal), needed)
        same = self.proof.agreement(model)
        return Proof(100 * same.share, 100 * same.bound, same.samples, share_needed(self.least / 100))

    def word(self, proof: Proof) -> str:
        bound = "nothing" if not math.isfinite(proof.bound) else f"{proof.bound:.2f} {self.unit}"
        return f"{proof.reached:.2f} {self.unit} on {proof.samples} samples, which prove {bound} (95 %)"


def fewest_bits(measurement: Measurement, config: Config, goal: Goal, refine: Refine) -> Refined:
    """Return the refined allocation of fewest bits, or of least cost, that reaches `goal`, up to that of `config`.

    Raises BudgetError if none does.
    """
    allocations: dict[int, Allocation | None] = {}
    grid = Grid.of(measurement, config)

    def at(step: int) -> Allocation | None:
        if step not in allocations:
            try:
                allocations[step] = allocate_bits(measurement, grid.at(config.budgets, step))
            except BudgetError:
                allocations[step] = None
        return allocations[step]

    def reaches(step: int) -> bool:
        allocation = at(step)
        return allocation is not None and goal.estimate(quantized_model(allocation)) >= goal.least

    low, first = grid.low - 1, grid.high
    while first - low > 1:
        middle = (low + first) // 2
        low, first = (low, middle) if reaches(middle) else (middle, first)

    def refined(step: int) -> Refined | None:
        allocation = at(step)
        return None if allocation is None else refine(allocation, grid.at(config, step))

    return _Ladder(goal, first, grid, at, refined).descend()


@dataclass(frozen=True)
class _Ladder:
    """Budgets to prove `goal` at, from the most of `grid` down to `first` and below; at, refined: what each gives."""

    goal: Goal
    first: int
    grid: Grid
    at: Callable[[int], Allocation | None]
    refined: Callable[[int], Refined | None]

    def descend(self) -> Refined:
        """Return the last model before the first that does not prove the goal. Raises BudgetError without one."""
        best: Refined | None = None
        high = self.grid.high
        lowest, proof = high, None
        rungs = {high, self.first, *(self.first + rung for rung in _RUNGS)}
        for step in sorted((rung for rung in rungs if rung <= high), reverse=True):
            trial = self._trial(step)
            if trial is None:
                continue
            proof = self.goal.prove(trial.model)
            if proof.bound < self.goal.least:
                break
            best, lowest = trial, step
        if best is None:
            raise BudgetError(_missed(self.goal, proof, self.grid.word(high)))
        if lowest == self.first:
            return self._below(best)
        refined = self.refined(lowest)
        return refined if refined and self.goal.prove(refined.model).bound >= self.goal.least else best

    def _trial(self, step: int) -> Refined | None:
        """Refined at both ends; between them the curves' allocation does."""
        if step in (self.first, self.grid.high):
            return self.refined(step)
        allocation = self.at(step)
        return None if allocation is None else Refined(allocation, quantized_model(allocation))

    def _below(self, best: Refined) -> Refined:
        """Fewer bits than `first`, as long as refinement makes up for them."""
        step = self.first
        for _ in range(_REFINEMENTS - 1):
            step = self._lower(step, self.goal.prove(best.model).bound - self.goal.least)
            trial = self.refined(step) if step >= self.grid.low else None
            if trial is None or self.goal.prove(trial.model).bound < self.goal.least:
                break
            best = trial
        return best

    def _lower(self, step: int, spare: float) -> int:
        """Return the next budget below `step`, whose model proves `spare` more than the goal."""
        start = self.at(step)
        if self.goal.unit != "dB" or start is None:
            return step - int(_FEWER_BITS / STEP)
        most = start.predicted * 10 ** (_SPENT * min(spare, _MOST_DB) / 10)  # inf without any error
        low, high = self.grid.low - 1, step
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.at(middle)
            low, high = (low, middle) if trial is not None and trial.predicted <= most else (middle, high)
        return min(high, step - 1)


def _missed(goal: Goal, proof: Proof | None, widest: str) -> str:
    """Say what the widest budget reaches, and what would help."""
    result = f"{widest} {goal.word(proof)}" if proof is not None else "no budget can be met"
    if proof is not None and proof.reached >= goal.least and proof.needed:
        fix = f"too few to tell: give about {proof.needed} with --validation, or ask for less"
    else:
        fix = "ask for less or allow more --widths"
    return f"{goal.option} {goal.least:g} cannot be met: {result}; {fix}"
