"""Find the fewest bits that reach a goal: output SQNR, or agreement of the top class, of the emitted model.

Both are judged on samples that no measurement has used. Budgets are bisected on a grid with the curves' allocation. The
result is refined, and fewer bits are tried as long as refinement makes up for them.
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

STEP = 1 / 16  # bits between budgets on the grid
_REFINEMENTS = 4  # at most
_BIT_DB = 6.0  # dB per bit

Refine = Callable[[Allocation, Config], Refined]


@dataclass(frozen=True)
class Goal:
    """A goal set by `option`: at least `least` dB or percent. batches: feeds, with the outputs of the float model."""

    option: str
    least: float
    batches: tuple[tuple[dict[str, Any], list[NDArray[Any]]], ...]
    runtime: Runtime
    samples: int

    @classmethod
    def of(
        cls, config: Config, original: onnx.ModelProto, samples: Samples, size: int, runtime: Runtime
    ) -> "Goal | None":
        """Return the goal of `config`, if any.

        Raises ConfigError for --top1-agreement unless the model outputs one row of scores per sample.
        """
        if config.sqnr is None and config.top1_agreement is None:
            return None
        session = runtime.session(original, "all")
        batches = tuple((feeds, session.run(feeds)) for _, feeds in samples.counted_batches(size))
        if config.sqnr is not None:
            return cls("--sqnr", config.sqnr, batches, runtime, len(samples))
        outputs = batches[0][1]
        if len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].dtype.kind != "f":
            shapes = ", ".join(str(list(v.shape)) for v in outputs)
            raise ConfigError(
                f"--top1-agreement: the model outputs {shapes}, not one row of scores per sample; use --sqnr"
            )
        return cls("--top1-agreement", config.top1_agreement or 0.0, batches, runtime, len(samples))

    @property
    def unit(self) -> str:
        return "dB" if self.option == "--sqnr" else "%"

    def reached(self, model: onnx.ModelProto) -> float:
        """Measure a quantized model, in the goal's unit."""
        session = self.runtime.session(model, "all")
        signal = noise = same = total = 0.0
        for feeds, floats in self.batches:
            for value, expected in zip(session.run(feeds), floats, strict=True):
                if expected.dtype.kind == "f":
                    reference = expected.astype(np.float64)
                    signal += float(np.square(reference).sum())
                    noise += float(np.square(value - reference).sum())
                    same += float((value.argmax(axis=-1) == expected.argmax(axis=-1)).sum())
                    total += expected.size / expected.shape[-1] if expected.ndim else 1
        return sqnr_db(signal, noise) if self.option == "--sqnr" else 100 * same / total

    def check(self, model: onnx.ModelProto) -> str:
        """Word what the emitted model reaches. Raises VerificationError if it misses the goal."""
        reached = self.reached(model)
        if reached < self.least:
            raise VerificationError(f"{self.option} {self.least:g}: the emitted model has {reached:.2f} {self.unit}")
        return f"{self.option} {self.least:g}: {reached:.2f} {self.unit} on {self.samples} held-out samples"


def fewest_bits(measurement: Measurement, config: Config, goal: Goal, refine: Refine) -> Refined:
    """Return the refined allocation of fewest bits that reaches `goal`, up to the bits of `config`.

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
    """Refine from the budget `first` downwards; fall back to the unrefined allocation if that does not help."""
    best: Refined | None = None
    step, greatest = first, at(first)[1]
    for _ in range(_REFINEMENTS):
        allocation = at(step)[0]
        if allocation is None:
            break
        refined = refine(allocation, with_budget(config, config.moved, step * STEP))
        reached = goal.reached(refined.model)
        greatest = max(greatest, reached)
        if reached < goal.least:
            break
        best = refined
        spare = min((reached - goal.least) / _BIT_DB, 8.0) if goal.unit == "dB" else 4 * STEP  # inf without any error
        step -= max(1, int(spare / STEP))
        if step * STEP < 1:
            break
    plain, value = at(first)
    if best is None and plain is not None and value >= goal.least:
        best = Refined(plain, quantized_model(plain))
    if best is None:
        result = f"{first * STEP:g} bits give {greatest:.2f} {goal.unit} on {goal.samples} held-out samples"
        raise BudgetError(f"{goal.option} {goal.least:g} cannot be met: {result}; ask for less or allow more --widths")
    return best
