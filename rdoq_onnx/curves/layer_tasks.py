"""Layers of a large network worked on by other processes: what is kept of a layer travels there and back."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.statistics import Statistics
from rdoq_onnx.curves.layerwise import Layerwise
from rdoq_onnx.system.scratch import Carried
from rdoq_onnx.system.summation import Compute, Sum
from rdoq_onnx.system.threads import Alone

Array = NDArray[Any]
Key = TypeVar("Key", bound=Hashable)

_OF_INPUTS = ("mean", "vectors", "covariance")  # kept with the first layer that reads the same input
_OF_TABLES = ("basis", "powers", "shares")


def spread(
    task: Callable[[Layerwise, Key], None], layerwise: Layerwise, keys: Mapping[Key, int], compute: Compute
) -> Iterator[None]:
    """Run `task` for each of `keys`, given with the index of its layer, by `compute`; yield after each.

    What it puts into the statistics is the same as in this process.
    """
    statistics = layerwise.statistics
    bare = replace(layerwise, statistics=replace(statistics, scratch=Carried()), workers=Alone())
    items = [(0, _Item(key, statistics, names_for(layerwise, index))) for key, index in keys.items()]
    for _, made in compute(Sum("layers", (_Work(task, bare),), items), range(len(items))):
        for name, array in made.items():
            statistics.scratch.put(name, array)
        yield


def names_for(layerwise: Layerwise, index: int) -> tuple[str, ...]:
    """Return the names of the arrays that work on a layer reads."""
    statistics, layer = layerwise.statistics, layerwise.network.weights[index]
    own = statistics.kept(layer)
    tables = [tie.table for tie in layerwise.network.ties if tie.layer == layer.name]
    named = [(kind, statistics.first(layer)) for kind in _OF_INPUTS]
    named += [(kind, table) for table in tables for kind in _OF_TABLES]
    others = (statistics.name(kind, each) for kind, each in named if statistics.has(kind, each))
    return tuple(dict.fromkeys((*own, *others)))


@dataclass(frozen=True)
class _Item(Generic[Key]):
    """A key, with the names of the arrays of its layer."""

    key: Key
    statistics: Statistics
    names: tuple[str, ...]

    def __len__(self) -> int:
        return 1

    def loaded(self) -> tuple[Key, dict[str, Array]]:
        """Return the key and the arrays, read."""
        return self.key, {name: np.array(self.statistics.scratch.get(name)) for name in self.names}


@dataclass(frozen=True)
class _Work(Generic[Key]):
    """A task on layers, whose statistics come with each of them."""

    task: Callable[[Layerwise, Key], None]
    layerwise: Layerwise

    def loaded(self) -> Callable[[_Item[Key] | tuple[Key, dict[str, Array]]], dict[str, Array]]:
        def run(item: _Item[Key] | tuple[Key, dict[str, Array]]) -> dict[str, Array]:
            key, arrays = item.loaded() if isinstance(item, _Item) else item
            scratch = Carried(arrays=arrays)
            statistics = replace(self.layerwise.statistics, scratch=scratch)
            self.task(replace(self.layerwise, statistics=statistics), key)
            return scratch.made

        return run
