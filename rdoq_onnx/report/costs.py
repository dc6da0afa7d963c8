"""What a run's widths cost in the user's unit: figures, their form as JSON and as text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.allocation.frontier import Point, cost_frontier
from rdoq_onnx.config import Budgets
from rdoq_onnx.model.cost_rows import TIMES
from rdoq_onnx.report.wording import percent

_UNITS = {"us": "µs"}


@dataclass(frozen=True)
class CostReport:
    """What all layers and products cost.

    source: a preset, or a file. budget: None without one. at_8_bits: what 8 bits everywhere cost; None if a file does
    not say. bound: the least δ predicted of any widths within the budget. nodes: what each node costs. products: what
    products of two activations cost, of `spent`. frontier: δ predicted over the cost. measured: of a time, what a run
    of one sample takes.
    """

    source: str
    unit: str
    budget: float | None
    spent: float
    at_8_bits: float | None
    bound: float | None
    nodes: Mapping[str, float]
    products: float
    frontier: tuple[Point, ...]
    measured: float | None = None

    def document(self) -> dict[str, Any]:
        """Return the value of `cost` in the document of `--json`."""
        points = [{"cost": point.bits, "predicted": point.distortion} for point in self.frontier]
        figures = ("source", "unit", "budget", "spent", "at_8_bits", "bound", "measured")
        return {name: getattr(self, name) for name in figures} | {"frontier": points}

    def rows(self) -> list[tuple[str, str]]:
        """Word the figures as rows of the summary."""
        share = "" if not self.at_8_bits else f", {percent(self.spent / self.at_8_bits)} of 8 bits everywhere"
        within = "" if self.budget is None else f", of a budget of {amount(self.budget, self.unit)}"
        rows = [("cost", f"{amount(self.spent, self.unit)}{share}{within}")]
        if self.products:
            rows.append(("  of it products", f"{amount(self.products, self.unit)}, of two activations"))
        if self.measured is not None:
            off = f"{abs(self.measured / self.spent - 1):.0%} {'more' if self.measured > self.spent else 'less'}"
            rows.append(("  measured", f"{amount(self.measured, self.unit)}" + (f", {off}" if self.spent else "")))
        return rows

    def card(self) -> tuple[str, str, str]:
        """Return value, name and remark for the page."""
        remark = f"{percent(self.spent / self.at_8_bits)} of 8 bits everywhere" if self.at_8_bits else "over all layers"
        return amount(self.spent, self.unit), f"cost, by {self.source}", remark

    def frontier_rows(self) -> Iterator[tuple[str, str, str]]:
        """Word each point: its share of 8 bits everywhere, its cost, its δ."""
        for point in self.frontier:
            share = percent(point.bits / self.at_8_bits) if self.at_8_bits else ""
            yield share, amount(point.bits, self.unit), f"{point.distortion:.4g}"


def cost_report(allocation: Allocation, budgets: Budgets, seconds: float | None = None) -> CostReport | None:
    """Collect the figures of an allocation; None without a cost. seconds: of a run, if the cost is a time."""
    if budgets.cost is None:
        return None
    pricing = Pricing(allocation.measurement, budgets.cost)
    nodes = pricing.spent(allocation.bits)
    products = sum(nodes[node.node] for node in pricing.nodes if node.layer is None)
    return CostReport(
        source=budgets.cost.name,
        unit=budgets.cost.unit,
        budget=None if budgets.budget is None else pricing.budget(budgets.budget),
        spent=pricing.total(allocation),
        at_8_bits=pricing.at_8_bits,
        bound=None if budgets.budget is None else allocation.bound,
        nodes=nodes,
        products=products,
        frontier=cost_frontier(allocation, budgets).points,
        measured=None if seconds is None else 1e6 * seconds / TIMES[budgets.cost.unit],
    )


def amount(value: float, unit: str) -> str:
    """Word a cost with four digits, as "9.625 G bit operations"."""
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1.0, ""))
    scaled = value / scale
    figure = f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.4g}"
    return " ".join(part for part in (figure, prefix, _UNITS.get(unit, unit)) if part)
