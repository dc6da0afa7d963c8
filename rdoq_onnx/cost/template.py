"""Write the rows that `--cost FILE` takes for a network, to be filled in or filled in already."""

import csv
import io
from collections.abc import Mapping

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.patterns import as_pattern
from rdoq_onnx.cost.tables import BITS, IN_FLOAT, node_costs
from rdoq_onnx.model.cost_rows import FLOAT, HEADER, Cost

DIGITS = 6  # of a cost of rows
_WIDTHS = (2, 4, 8)
_UNFIT = frozenset(' ,"\n')  # for the name of a column


def template(network: Network, sizes: Mapping[str, int], cost: Cost | None) -> str:
    """Return the CSV: a row for each node at some widths of its weights and of its input, `float` where it has none.

    cost: what fills the last column in; None leaves it empty, but at 0 bits. sizes: elements of each tensor per sample.
    """
    unit = "" if cost is None or _UNFIT & set(cost.unit) else cost.unit
    written = io.StringIO()
    lines = csv.writer(written, lineterminator="\n")
    lines.writerow((*HEADER[:3], f"cost_{unit}" if unit else "cost"))
    if cost is not None and cost.rows:
        lines.writerows(
            (r.pattern, _range(*r.weight_bits), _range(*r.activation_bits), f"{r.cost:.{DIGITS}g}") for r in cost.rows
        )
        return written.getvalue()
    quantized = {f for a in network.activations for f in a.feeds}
    for node in node_costs(network, sizes, cost or Cost("size")):
        name = as_pattern(node.node)
        if node.layer is not None:
            lines.writerow((name, 0, "*", 0))
        for w in _WIDTHS if node.layer is not None or node.data[1] in quantized else (IN_FLOAT,):
            for a in _WIDTHS if node.data[0] in quantized else (IN_FLOAT,):
                lines.writerow((name, _width(w), _width(a), "" if cost is None else f"{node.cost[w, a]:.10g}"))
    return written.getvalue()


def _width(column: int) -> str:
    return "float" if column == IN_FLOAT else str(BITS[column])


def _range(first: int, last: int) -> str:
    if (first, last) == (0, FLOAT):
        return "*"
    if first == FLOAT:
        return "float"
    return str(first) if first == last else f"{first}-{last}"
