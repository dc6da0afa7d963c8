"""What a model's inputs want, and the samples that go there."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from rdoq_onnx.errors import ModelError

Array = NDArray[Any]


@dataclass(frozen=True)
class InputSpec:
    """An input of the model. None in `shape` is a free dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples by input name, on axis 0 of all arrays but the `constants`.

    source: where they come from, for the user. batch: how many a run takes, None if the model leaves it free.
    rows: of axis 0 that make one sample; more than one where the model does not keep them apart.
    """

    source: str
    arrays: Mapping[str, Array]
    constants: frozenset[str] = frozenset()
    batch: int | None = None
    rows: int = 1

    def __len__(self) -> int:
        return next((len(a) // self.rows for name, a in self.arrays.items() if name not in self.constants), 0)

    def feeds(self, chosen: Any) -> dict[str, Array]:
        """What to feed for the samples `chosen` (indices or a slice)."""
        if self.rows > 1:
            first = self.rows * np.arange(len(self))[chosen]
            chosen = (first[:, None] + np.arange(self.rows)).reshape(-1)
        return {name: a if name in self.constants else a[chosen] for name, a in self.arrays.items()}

    def inseparable(self) -> "Samples":
        """All rows of a run as one sample."""
        return replace(self, rows=self.rows * (self.batch or 1), batch=1)

    def counted_batches(self, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """(number of samples, feeds) by `size`, or by the model's own `batch`; the last may be smaller."""
        step = self.batch or size
        for start in range(0, len(self), step):
            yield min(step, len(self) - start), self.feeds(slice(start, start + step))

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """The feeds of `counted_batches`."""
        return (feeds for _, feeds in self.counted_batches(size))

    def take(self, chosen: Any) -> "Samples":
        return replace(self, arrays=self.feeds(chosen))

    def some(self, count: int) -> "Samples":
        """At most `count` samples, evenly spaced, in whole batches where the model fixes their size."""
        step = self.batch or 1
        groups = len(self) // step
        if groups * step <= count:
            return self
        picked = np.linspace(0, groups - 1, max(count // step, 1)).astype(int)
        return self.take((picked[:, None] * step + np.arange(step)).reshape(-1))

    def split(self, fraction: float, seed: int) -> tuple["Samples", "Samples"]:
        """Two disjoint random parts, `fraction` in the first, in the order that the samples have here.

        Neither is empty unless there is only one sample, or one batch where the model fixes its size.
        """
        step = self.batch or 1
        groups = len(self) // step
        first = int(np.clip(round(fraction * groups), 1, max(groups - 1, 1)))
        chosen = np.zeros(groups, bool)
        chosen[np.random.default_rng(seed).permutation(groups)[:first]] = True
        rows = np.repeat(chosen, step)
        return self.take(np.flatnonzero(rows)), self.take(np.flatnonzero(~rows))

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and values, in hexadecimal."""
        state = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            state.update(repr((name, array.dtype.str, array.shape)).encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()

    def fixed_batch(self, specs: Sequence[InputSpec]) -> int | None:
        """How many samples the model takes in one run, None if any number.

        One at a time where a constant has a dimension of 1, since that may stand for the batch.
        """
        if any(1 in self.arrays[name].shape for name in self.constants):
            return 1
        fixed = [s.shape[0] for s in specs if s.name not in self.constants and s.shape[0] is not None]
        return min(fixed, default=None)


def input_specs(model: ModelProto) -> tuple[InputSpec, ...]:
    """The graph inputs that are no initializers. Raises ModelError on one that no array can feed."""
    graph = model.graph
    constant = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    specs = []
    for value in graph.input:
        if value.name in constant:
            continue
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape") or not kind.elem_type:
            raise ModelError(f"input {value.name!r} has no known rank and type; export it with both")
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind not in "fiub":
            found = "string" if dtype.kind == "O" else dtype
            raise ModelError(f"input {value.name!r} is of type {found}; export it as float or integer")
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        specs.append(InputSpec(value.name, dtype, shape))
    return tuple(specs)
