"""What the channels of each layer pay for in microseconds, and what is saved without them.

A channel pays for the layers that read it, too, since they take less without it. With t_i what layer i takes on
integers, m_i and m'_i its slopes by output and input channels (micro_models.py), and j over the layers that read what i
writes:

    own_i   = t_i (1 - m'_i) + Σ_j m'_j t_j
    saved_i = m_i t_i + Σ_j m'_j t_j

m'_i counts as 0 where the channels that i reads cannot be removed. So what all own adds up to what all take.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.model.graph import CLAMPS, Graph
from rdoq_onnx.profiling.micro_models import Slopes

# Operators that leave the channels apart, in their order.
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean"})
_KEEPING = CLAMPS | _POOLS | {"Flatten", "HardSwish", "LeakyRelu", "Sigmoid"}


@dataclass
class Price:
    """The terms of the module's docstring, of a node."""

    own: float
    saved: float


def prices_of(
    network: Network, times: Mapping[str, float], slopes: Mapping[str, Slopes], removable: Collection[str]
) -> dict[str, Price]:
    """Return the price of each node of the searched weights. removable: the nodes that can lose channels."""
    uses = [use for layer in network.searched for use in layer.uses]
    prices = {u.node: Price(times[u.node], times[u.node] * slopes[u.node].outputs) for u in uses}
    writers, graph = {use.output: use.node for use in uses}, Graph(network.model)
    for use in uses:
        writer = _writer(use.data, writers, graph)
        if writer in removable:
            read = times[use.node] * slopes[use.node].inputs
            prices[use.node].own -= read
            prices[writer].own += read
            prices[writer].saved += read
    return prices


def _writer(tensor: str, writers: Mapping[str, str], graph: Graph) -> str:
    """Return the node that writes the channels of `tensor`, if nothing else joins them on the way; else nothing."""
    while tensor not in writers:
        node = graph.producer.get(tensor)
        data = [] if node is None else [i for i in node.input if i and i not in graph.constants]
        if node is None or len(data) != 1 or node.op_type not in _KEEPING:
            return ""
        (tensor,) = data
    return writers[tensor]
