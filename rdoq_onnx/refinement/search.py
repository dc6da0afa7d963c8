"""The fewest bits that reach a goal: output SQNR, or agreement of the top class, of the emitted model.

Both are judged on samples that no measurement has seen. Budgets are bisected on a grid with the curves' allocation;
the one found is refined, and fewer bits are tried for as long as refinement pays for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.allocation.frontier import with_budget
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.quantized_model import quantized_model
from rdoq_onnx.errors import BudgetError, ConfigError, VerificationError
from rdoq_onnx.observation.distortion import sqnr_db
from rdoq_onnx.refinement.refine import Refined
from rdoq_onnx.system.runtime import Runtime

STEP = 1 / 16  # bits between budgets that are tried
_REFINEMENTS = 4  # at most
_BIT_DB = 6.0  # what a bit is worth

Refine = Callable[[Allocation, Config], Refined]


@dataclass(frozen=True)
class Goal:
    """option: that asked for it. least: dB, or percent. batches: feeds, with what the float model gives."""

    option: str
    least: float
    batches: tuple[tuple[dict[str, Any], list[NDArray[Any]]], ...]
    runtime: Runtime
    samples: int

    @classmethod
    def of(
        cls, config: Config, original: onnx.ModelProto, samples: Samples, size: int, runtime: Runtime
    ) -> "Goal | None":
        """The goal of `config`, if it has one. Raises ConfigError if the model does not give one row of scores."""
        if config.sqnr is None and config.top1_agreement is None:
            return None
        session = runtime.session(original, "all")
        batches = tuple((feeds, session.run(feeds)) for _, feeds in samples.counted_batches(size))
        if config.sqnr is not None:
            return cls("--sqnr", config.sqnr, batches, runtime, len(samples))
        values = batches[0][1]
        if len(values) != 1 or values[0].ndim != 2 or values[0].dtype.kind != "f":
            shapes = ", ".join(str(list(v.shape)) for v in values)
            raise ConfigError(f"--top1-agreement: the model gives {shapes}, not one row of scores a sample; use --sqnr")
        return cls("--top1-agreement", config.top1_agreement or 0.0, batches, runtime, len(samples))

    @property
    def unit(self) -> str:
        return "dB" if self.option == "--sqnr" else "%"

    def reached(self, model: onnx.ModelProto) -> float:
        """What a quantized model reaches, in the goal's unit."""
        session = self.runtime.session(model, "all")
        signal = noise = same = total = 0.0
        for feeds, floats in self.batches:
            for value, wanted in zip(session.run(feeds), floats, strict=True):
                if wanted.dtype.kind == "f":
                    reference = wanted.astype(np.float64)
                    signal += float(np.square(reference).sum())
                    noise += float(np.square(value - reference).sum())
                    same += float((value.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())
                    total += wanted.size / wanted.shape[-1] if wanted.ndim else 1
        return sqnr_db(signal, noise) if self.option == "--sqnr" else 100 * same / total

    def check(self, model: onnx.ModelProto) -> str:
        """What the emitted model reaches, in words. Raises VerificationError if it is less than asked for."""
        found = self.reached(model)
        if found < self.least:
            raise VerificationError(f"{self.option} {self.least:g}: the emitted model has {found:.2f} {self.unit}")
        return f"{self.option} {self.least:g}: {found:.2f} {self.unit} on {self.samples} samples held out"


def fewest_bits(measurement: Measurement, config: Config, goal: Goal, refine: Refine) -> Refined:
    """The allocation of fewest bits that reaches `goal`, up to the bits of `config`.

    Raises BudgetError if none does.
    """
    tried: dict[int, tuple[Allocation | None, float]] = {}

    def at(step: int) -> tuple[Allocation | None, float]:
        if step not in tried:
            try:
                allocation = allocate_bits(measurement, with_budget(config.budgets, config.moved, step * STEP))
                tried[step] = allocation, goal.reached(quantized_model(allocation))
            except BudgetError:
                tried[step] = None, -np.inf
        return tried[step]

    most = config.activation_bits if config.moved == "activations" else config.weight_bits
    low, high = int(1 / STEP) - 1, int((most or 8.0) / STEP)
    first = high
    while first - low > 1:
        middle = (low + first) // 2
        low, first = (low, middle) if at(middle)[1] >= goal.least else (middle, first)
    return _refined(goal, refine, config, first, at)


def _refined(
    goal: Goal, refine: Refine, config: Config, first: int, at: Callable[[int], tuple[Allocation | None, float]]
) -> Refined:
    """Refinements from the budget `first` downwards; without one where it does not help."""
    best: Refined | None = None
    step, found = first, at(first)[1]
    for _ in range(_REFINEMENTS):
        allocation = at(step)[0]
        if allocation is None:
            break
        refined = refine(allocation, with_budget(config, config.moved, step * STEP))
        reached = goal.reached(refined.model)
        found = max(found, reached)
        if reached < goal.least:
            break
        best = refined
        spare = (reached - goal.least) / _BIT_DB if goal.unit == "dB" else 4 * STEP
        step -= max(1, int(spare / STEP))
        if step * STEP < 1:
            break
    plain, value = at(first)
    if best is None and plain is not None and value >= goal.least:
        best = Refined(plain, quantized_model(plain))
    if best is None:
        most = f"{first * STEP:g} bits give {found:.2f} {goal.unit} on {goal.samples} samples held back"
        raise BudgetError(f"{goal.option} {goal.least:g} cannot be met: {most}; ask for no more, or for other --widths")
    return best
