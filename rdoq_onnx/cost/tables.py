"""The cost of each node at each pair of widths.

    bops:  MACs · w · a,  w bits a weight and a bits an element of its input, 32 for what stays in float
    size:  elements · w / 8
    file:  the last row that matches the node and the widths; between rows, refused or along a line

A layer may have a width for each channel: each of n channels costs a share 1/n of the node at its width.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import matches, suggestion
from rdoq_onnx.cost.work import multiplications
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import FLOAT, WIDEST, Cost, CostRow

Float = NDArray[np.float64]

BITS = np.array([*range(WIDEST + 1), FLOAT])  # of the columns of a table
IN_FLOAT = WIDEST + 1  # the column of what stays in float


@dataclass(frozen=True, eq=False)
class NodeCost:
    """What a node costs, [10, 10]: by the width of its weights, then of its input; columns as `BITS`, inf if refused.

    layer: the index of its weights in `Network.searched`; None for a product of two activations, whose right operand
    stands for the weights. data: the tensor that it reads, or both operands.
    """

    node: str
    layer: int | None
    data: tuple[str, ...]
    cost: Float


def node_costs(network: Network, sizes: Mapping[str, int], cost: Cost) -> tuple[NodeCost, ...]:
    """Return the costs of all nodes of searched weights, then of products.

    sizes: elements of each tensor per sample. Raises ConfigError if rows match nothing, or do not cover a node.
    """
    nodes = [
        (use.node, k, (use.data,), (use.node, layer.weight))
        for k, layer in enumerate(network.searched)
        for use in layer.uses
    ]
    products = [(p.node, None, p.operands, (p.node,)) for p in network.products]
    if cost.rows:
        tables = _from_rows(cost, [names for *_, names in (*nodes, *products)], [s.node for s in network.skipped])
    elif cost.name == "bops":
        work = multiplications(network, sizes)
        tables = [np.outer(BITS, BITS) * float(work[node]) for node, *_ in (*nodes, *products)]
    else:
        tables = [_bytes(network, node, k) for node, k, *_ in nodes] + [np.zeros((10, 10)) for _ in products]
    return tuple(
        NodeCost(node, layer, data, table)
        for (node, layer, data, _), table in zip((*nodes, *products), tables, strict=True)
    )


def _bytes(network: Network, node: str, layer: int) -> Float:
    """Weights are stored once: the first node that applies them pays."""
    own = network.searched[layer]
    elements = math.prod(own.linear.shape) if own.uses[0].node == node else 0
    return np.repeat(BITS[:, None], len(BITS), axis=1) * elements / 8


def _from_rows(cost: Cost, nodes: Sequence[tuple[str, ...]], in_float: Sequence[str]) -> list[Float]:
    """Return the table of each node, given the names that patterns match; rows of nodes left in float count nothing."""
    tables = [np.full((len(BITS), len(BITS)), np.inf) for _ in nodes]
    matched: dict[str, list[int]] = {}
    for row in cost.rows:
        if row.pattern not in matched:
            matched[row.pattern] = [k for k, names in enumerate(nodes) if matches(row.pattern, names)]
            if not matched[row.pattern] and not matches(row.pattern, in_float):
                hint = suggestion(row.pattern, [n for names in nodes for n in names])
                raise ConfigError(f"--cost {cost.name}: layer {row.pattern!r} matches no layer or product{hint}")
        for k in matched[row.pattern]:
            tables[k][_cells(row)] = row.cost
    for table, names in zip(tables, nodes, strict=True):
        if not np.isfinite(table).any():
            raise ConfigError(f"--cost {cost.name}: has no row for {names[0]!r}; give one, or one for '.*'")
    return [_between(table) for table in tables] if cost.interpolated else tables


def _cells(row: CostRow) -> tuple[NDArray[np.bool_], ...]:
    """Return the index of the cells of a row's widths."""
    first, last = row.weight_bits
    low, high = row.activation_bits
    return np.ix_((first <= BITS) & (last >= BITS), (low <= BITS) & (high >= BITS))


def _between(table: Float) -> Float:
    """Fill widths between those of two rows: along the weights' widths, then along the activations'."""
    result = table.copy()
    for lines in (result.T[: WIDEST + 1, : WIDEST + 1], result.T[IN_FLOAT:, : WIDEST + 1], result[:, : WIDEST + 1]):
        for line in lines:  # a view
            known = np.flatnonzero(np.isfinite(line))
            if len(known):
                inside = np.arange(known[0], known[-1] + 1)
                line[inside] = np.interp(inside, known, line[known])
    return result


def at_8_bits(nodes: Sequence[NodeCost], quantized: Collection[str]) -> float | None:
    """Return what 8 bits everywhere cost; None if the rows of a file do not say.

    quantized: the tensors that have a quantizer; others stay in float.
    """
    total = _total(nodes, quantized, WIDEST, WIDEST)
    return total if math.isfinite(total) else None


def _total(nodes: Sequence[NodeCost], quantized: Collection[str], weights: int, activations: int) -> float:
    """Return what one width of weights and one of activations cost."""
    total = 0.0
    for each in nodes:
        columns = [activations if tensor in quantized else IN_FLOAT for tensor in each.data]
        total += float(each.cost[weights if each.layer is not None else columns[1], columns[0]])
    return total


def typical_widths(share: float, nodes: Sequence[NodeCost], quantized: Collection[str]) -> tuple[float, float]:
    """Return about the widths of weights and activations with which a network costs this share of 8 bits everywhere.

    A side whose bits cost nothing keeps 8. Activations lose bits last: on MobileNet-v2 and bit operations, channel
    scales chosen for wide activations and narrow weights gave the least distortion from 15 % to 60 %.
    """
    share, whole = min(max(share, 1e-3), 1.0), _total(nodes, quantized, WIDEST, WIDEST)
    weights = WIDEST * (share if _total(nodes, quantized, WIDEST // 2, WIDEST) < whole else 1.0)
    activations = WIDEST * (share**0.25 if _total(nodes, quantized, WIDEST, WIDEST // 2) < whole else 1.0)
    return weights, max(1.0, activations)
