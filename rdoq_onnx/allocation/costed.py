"""Allocate within a budget in the user's unit: the nodes of a network as terms of paired.py, and what they spend.

A layer whose nodes read more than two activations, and more than four activations that share nodes, would have too many
combinations of widths: these activations take one width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.paired import MOST_SHARED, Problem, Term, least_cost, solve_pairs
from rdoq_onnx.cost.tables import IN_FLOAT, NodeCost, at_8_bits, node_costs
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import BudgetError, ConfigError
from rdoq_onnx.model.cost_rows import Amount, Cost
from rdoq_onnx.model.union_find import UnionFind

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pricing:
    """What the nodes of a measured network cost in a unit."""

    measurement: Measurement
    cost: Cost

    @cached_property
    def nodes(self) -> tuple[NodeCost, ...]:
        """Raises ConfigError as `node_costs`."""
        return node_costs(self.measurement.network, self.measurement.observation.sizes, self.cost)

    @cached_property
    def sources(self) -> Mapping[str, int]:
        """The index of the activation that each tensor gets its width from."""
        return {f: k for k, a in enumerate(self.measurement.network.activations) for f in a.feeds}

    @cached_property
    def at_8_bits(self) -> float | None:
        """What 8 bits everywhere cost, as in `cost.tables.at_8_bits`."""
        return at_8_bits(self.nodes, self.sources)

    def budget(self, amount: Amount) -> float:
        """Return a budget in the unit of the cost. Raises ConfigError on a percentage of what is not known."""
        return budget_of(amount, self.at_8_bits, self.cost)

    def total(self, allocation: Allocation) -> float:
        """Return what all nodes cost; of bytes, with those of scales of blocks."""
        if self.cost.name == "size" and self.cost.preset:
            return allocation.weight_payload / 8
        return sum(self.spent(allocation.bits).values())

    def spent(self, bits: Integers) -> dict[str, float]:
        """Return what each node costs at `bits`, the width of each row of the curves."""
        own, channels = self.measurement.unit_rows(), self.measurement.channels
        result = {}
        for node in self.nodes:
            data = [bits[channels + self.sources[t]] if t in self.sources else IN_FLOAT for t in node.data]
            columns = [data[-1]] if node.layer is None else bits[own[node.layer]]
            result[node.node] = float(node.cost[columns, data[0]].mean())
        return result

    def solve(self, curves: Curves, amount: Amount) -> tuple[Integers, float]:
        """Return the width of each row of `curves` within the budget, and a bound on the distortion of any.

        Rows of extra 8-bit tensors are left at 0, and count nothing. Raises BudgetError.
        """
        problem, groups = self._problem(curves)
        budget = self.budget(amount)
        least = least_cost(problem)
        if not least <= budget:
            raise BudgetError(self._shortfall(budget, least))
        solution = solve_pairs(problem, budget)
        choice = np.zeros(len(curves.elements), np.int64)
        choice[: self.measurement.channels] = solution.units
        for group, width in zip(groups, solution.variables.tolist(), strict=True):
            choice[[self.measurement.channels + k for k in group]] = width
        return choice, solution.bound

    def _shortfall(self, budget: float, least: float) -> str:
        if not np.isfinite(least):
            return f"--cost {self.cost.name}: some layers and activations have no widths with a row in common; add rows"
        share = f", {100 * least / self.at_8_bits:.3g} % of 8 bits everywhere" if self.at_8_bits else ""
        return (
            f"--budget {budget:.6g} cannot be met: the cheapest allowed widths cost {least:.6g}{share}; "
            "give that much or allow narrower widths"
        )

    def _problem(self, curves: Curves) -> tuple[Problem, list[list[int]]]:
        """Return the problem, and the activations of each of its variables."""
        network, channels = self.measurement.network, self.measurement.channels
        by_layer: dict[int, list[NodeCost]] = {}
        for node in self.nodes:
            if node.layer is not None:
                by_layer.setdefault(node.layer, []).append(node)
        products = [[node] for node in self.nodes if node.layer is None]
        roots = _tied(len(network.activations), [self._read(nodes) for nodes in (*by_layer.values(), *products)])
        feeding = [k for k, a in enumerate(network.activations) if not a.fusion]
        groups: dict[int, list[int]] = {}
        for k in feeding:
            groups.setdefault(roots[k], []).append(k)
        place = {root: v for v, root in enumerate(groups)}
        variable = {f: place[roots[k]] for f, k in self.sources.items()}
        rows = self.measurement.unit_rows()
        terms = [_layer_term(nodes, variable, rows[layer], curves) for layer, nodes in by_layer.items()]
        terms += [_product_term(node, variable, curves) for (node,) in products]
        own = [curves.distortion[[channels + k for k in group]].sum(axis=0) for group in groups.values()]
        variables = np.stack(own) if own else np.zeros((0, len(curves.widths)))
        return Problem(curves.distortion[:channels], variables, tuple(terms)), list(groups.values())

    def _read(self, nodes: Iterable[NodeCost]) -> list[int]:
        """Return the activations that nodes read."""
        return list(dict.fromkeys(self.sources[t] for node in nodes for t in node.data if t in self.sources))


def budget_of(amount: Amount, at_8_bits: float | None, cost: Cost) -> float:
    """Return a budget in the unit of the cost. Raises ConfigError on a percentage of what is not known."""
    if amount.percent and at_8_bits is None:
        raise ConfigError(f"--cost {cost.name}: percentages are of 8 bits, at which some layers have no row; add them")
    return amount.of(at_8_bits or 0.0)


def _tied(count: int, reads: Sequence[Sequence[int]]) -> list[int]:
    """Return for each of `count` activations one that stands for all that must have its width."""
    tied, sharing = UnionFind(), UnionFind()
    for sets in (tied, sharing):
        sets.new(count)
    for read in reads:
        for other in read[1:]:
            sharing.unite(other, read[0])
            if len(read) > 2:
                tied.unite(other, read[0])
    components: dict[int, dict[int, None]] = {}
    for k in range(count):
        components.setdefault(sharing.find(k), {})[tied.find(k)] = None
    for members in components.values():
        first, *others = members
        for other in others if len(members) > MOST_SHARED else ():
            tied.unite(other, first)
    return [tied.find(k) for k in range(count)]


def _layer_term(nodes: Sequence[NodeCost], variable: Mapping[str, int], rows: slice, curves: Curves) -> Term:
    """Return the term of a layer's channels; each pays its share of the layer's nodes."""
    read, columns = _columns([t for node in nodes for t in node.data], variable, curves)
    width = len(curves.widths)
    count = rows.stop - rows.start
    cost = sum(node.cost[:width].T[column] for node, column in zip(nodes, columns, strict=True)) / count
    units = np.arange(rows.start, rows.stop)
    return Term(read, units, np.asarray(cost), np.zeros((width,) * len(read)))


def _product_term(node: NodeCost, variable: Mapping[str, int], curves: Curves) -> Term:
    read, (left, right) = _columns(node.data, variable, curves)
    fixed = node.cost[right, left]
    return Term(read, np.zeros(0, np.int64), np.zeros((*fixed.shape, len(curves.widths))), fixed)


def _columns(
    tensors: Sequence[str], variable: Mapping[str, int], curves: Curves
) -> tuple[tuple[int, ...], list[Integers]]:
    """Return the variables of `tensors`, and for each tensor its column at every combination of their widths."""
    read = tuple(dict.fromkeys(variable[t] for t in tensors if t in variable))
    grid = np.indices((len(curves.widths),) * len(read))
    floats = np.full(grid.shape[1:], IN_FLOAT)
    return read, [grid[read.index(variable[t])] if t in variable else floats for t in tensors]
