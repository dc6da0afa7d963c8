"""A minimum cut of a directed graph, by augmenting shortest paths (Edmonds, Karp, 1972)."""

from collections import deque
from collections.abc import Hashable, Mapping


def source_side(
    capacities: Mapping[tuple[Hashable, Hashable], float], source: Hashable, sink: Hashable
) -> set[Hashable]:
    """Return the nodes on the side of `source` in a minimum cut between it and `sink`.

    capacities: by edge, as (from, to). Of several minimum cuts it is the one with the fewest nodes.
    """
    left: dict[Hashable, dict[Hashable, float]] = {source: {}, sink: {}}
    for (start, end), capacity in capacities.items():
        left.setdefault(start, {})[end] = left.get(start, {}).get(end, 0.0) + capacity
        left.setdefault(end, {}).setdefault(start, 0.0)
    while True:
        parents = _reached(left, source)
        if sink not in parents:
            return set(parents)
        path, node = [], sink
        while node != source:
            path.append((parents[node], node))
            node = parents[node]
        flow = min(left[start][end] for start, end in path)
        for start, end in path:
            left[start][end] -= flow
            left[end][start] += flow


def _reached(left: Mapping[Hashable, Mapping[Hashable, float]], source: Hashable) -> dict[Hashable, Hashable]:
    """The nodes that edges with capacity left lead to, each with the node before it on a shortest path."""
    parents, pending = {source: source}, deque([source])
    while pending:
        node = pending.popleft()
        for end, capacity in left[node].items():
            if capacity > 0 and end not in parents:
                parents[end] = node
                pending.append(end)
    return parents
