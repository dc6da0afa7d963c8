"""Large arrays among a shard's sums: a file each, in the folder beside the shard's own file.

That file is written anew whenever a sum grows; of these arrays it holds the names alone. Files are mapped when they are
read, so that neither a shard nor the run that merges needs memory for sums that wait.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.system.scratch import LEAST_PARKED, PARKED, Scratch, bytes_in

Array = NDArray[Any]
_PREFIX = "sum-"


@dataclass(frozen=True)
class Filed:
    """An array in the file `name` of a scratch folder."""

    name: str


@dataclass(frozen=True)
class PartArrays:
    """The arrays of sums in the folder of one shard. Sums are arrays and Filed, in tuples and dicts."""

    scratch: Scratch

    def park(self, value: Any) -> Any:
        """Move the large arrays of a large sum to files, mapped read-only."""
        return self.mapped(self.filed(value))

    def filed(self, value: Any) -> Any:
        """Return a sum with Filed for the large arrays of a large one; those that are in files already stay there."""
        return _each(self._filed, value) if bytes_in(value) >= PARKED else value

    def mapped(self, value: Any) -> Any:
        """Invert `filed`; arrays in files are mapped, others copied: who adds to them may change them.

        Raises ConfigError if a file is missing.
        """
        return _each(self._mapped, value)

    def keep(self, values: Iterable[Any]) -> None:
        """Remove all files but those that `values` refer to."""
        kept = {each.name for value in values for each in _leaves(value) if isinstance(each, Filed)}
        self.scratch.drop(*(n for n in self.scratch.names() if n.startswith(_PREFIX) and n not in kept))

    def _filed(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.nbytes < LEAST_PARKED:
            return value
        name = self.scratch.name_of(value)
        if name is None:
            name = _PREFIX + secrets.token_hex(8)
            self.scratch.put(name, value)
        return Filed(name)

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, Filed):
            if not self.scratch.has(value.name):
                raise self.scratch.incomplete()
            return self.scratch.get(value.name)
        return value.copy() if isinstance(value, np.ndarray) else value


def has_filed(value: Any) -> bool:
    """Whether a sum refers to files."""
    return any(isinstance(each, Filed) for each in _leaves(value))


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply `function` to all leaves of tuples and dicts."""
    if isinstance(value, dict):
        return {key: _each(function, each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_each(function, each) for each in value)
    return function(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value
