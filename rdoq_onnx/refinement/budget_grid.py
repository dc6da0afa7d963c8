"""The budgets that a search for a goal tries: evenly spaced bits, or shares of a cost."""

import sys
from dataclasses import dataclass, replace

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.allocation.frontier import Settings, with_budget
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.model.cost_rows import Amount

STEP = 1 / 16  # bits
STEPS = int(MAX_BITS / STEP)  # to 8 bits, or to what they cost


@dataclass(frozen=True)
class Grid:
    """Budgets by their step, from `low` to `high`: of bits, or of what `config.cost` counts.

    whole: what `STEPS` steps cost: 100 percent of 8 bits everywhere or, where a file does not say what these cost, what
    the widths of least distortion do.
    """

    config: Config
    high: int
    percent: bool = True
    whole: float = 100.0

    @classmethod
    def of(cls, measurement: Measurement, config: Config) -> "Grid":
        """Return the budgets up to that of `config`. Raises ConfigError if its cost does not fit the network."""
        if not config.spends_cost or config.cost is None:
            most = config.activation_bits if config.moved == "activations" else config.weight_bits
            return cls(config, int((most or float(MAX_BITS)) / STEP))
        pricing = Pricing(measurement, config.cost)
        at_8_bits = pricing.at_8_bits
        if at_8_bits:
            grid = cls(config, STEPS)
        else:
            free = replace(config.budgets, budget=Amount(sys.float_info.max))
            grid = cls(config, STEPS, False, pricing.total(allocate_bits(measurement, free)))
        if config.budget is None:
            return grid
        share = pricing.budget(config.budget) / (at_8_bits or grid.whole or 1.0)
        return replace(grid, high=int(share * STEPS))

    @property
    def low(self) -> int:
        """The least budget: 1 bit, or a step of cost."""
        return 1 if self.config.spends_cost else int(1 / STEP)

    def at(self, settings: Settings, step: int) -> Settings:
        """Return `settings` with the budget of a step."""
        if self.config.spends_cost:
            return replace(settings, budget=Amount(step * self.whole / STEPS, self.percent))
        return with_budget(settings, self.config.moved, step * STEP)

    def word(self, step: int) -> str:
        if not self.config.spends_cost:
            return f"{step * STEP:g} bits give"
        return f"{100 * step / STEPS:.3g} % of {'8 bits everywhere' if self.percent else 'the most cost'} give"
