"""Sums that shards of a run share: each computes its own blocks of the samples, and a later run merges them.

A shard makes all passes that are not sums with a name (ranges, scales) over the same samples as any other. Of each sum
it keeps the nodes of the tree (tree_sum.py) that its own blocks make, and it stops where the next step needs a total
that it lacks. With the parts of all others at hand, it goes on to the sums that depend on it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.config import Config
from rdoq_onnx.curves.binding import Binding
from rdoq_onnx.curves.checkpoint import Steps, Store, read_values
from rdoq_onnx.curves.measure import measure
from rdoq_onnx.curves.part_arrays import PartArrays, has_filed
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system.curve_files import CurveFiles, Shard
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.system.summation import StoppedError, Sum, Summation, kept, resumed
from rdoq_onnx.system.tree_sum import TreeSum

_MARK = "shard"  # the value of a part that names its shard
_SUMS = "sums"


class Shards(Summation):
    """The sums of the `measurement` in the files of shards.

    shard: which one this run is, with its file in `store`; None to merge. parts: the values of the others' files.
    """

    shared = True

    def __init__(
        self, measurement: str, shard: Shard | None, store: Store, parts: Mapping[Path, Mapping[str, Any]]
    ) -> None:
        self._arrays = PartArrays(store.scratch)
        super().__init__(store.compute, store.scratch.park if shard is None else self._arrays.park)
        self._measurement, self._shard, self._store, self._parts = measurement, shard, store, parts

    def total(self, asked: Sum, advance: Advance, unfinished: Unfinished) -> Any:
        """Return a sum from all shards' blocks; a merging run computes those that no part has.

        Raises StoppedError for a shard if a block is missing, ConfigError if the blocks of a part are others.
        """
        tree = self._merged(asked)
        if self._shard is not None:
            for (level, index), value in self._own(asked, advance):
                tree.add(value, index, level)
            if tree.missing():
                raise StoppedError(asked.name)
            return tree.result()
        missing = tree.missing()
        advance(sum(len(block) for k, (_, block) in enumerate(asked.blocks) if k not in missing))
        for index, value in self.compute(asked, missing):
            tree.add(value, index)
            advance(len(asked.blocks[index][1]))
        return tree.result()

    def settle(self) -> None:
        """Stop a shard, all of whose sums are made. Raises StoppedError."""
        if self._shard is not None:
            raise StoppedError

    def _merged(self, asked: Sum) -> TreeSum:
        tree = TreeSum(len(asked.blocks), self.park)
        for path, values in self._parts.items():
            found = values.get(self._key(asked))
            if found is None:
                continue
            if found["firsts"] != asked.firsts:
                raise ConfigError(
                    f"--curves {path}: sums other batches of the samples; "
                    "run all shards with the same --memory and --provider cpu"
                )
            for (level, index), value in PartArrays(Scratch(checkpoint=path)).mapped(found["nodes"]):
                tree.add(value, index, level)
        return tree

    def _own(self, asked: Sum, advance: Advance) -> Sequence[Any]:
        """Compute the blocks of this shard, as far as its file lacks them; return the nodes that they make."""
        assert self._shard is not None
        key, mine = self._key(asked), blocks_of(self._shard, len(asked.blocks))
        before = self._store.get(key)
        tree = resumed(asked, self._arrays.mapped(before), advance, self.park)
        missing = [k for k in tree.missing() if k in mine]
        for index, value in self.compute(asked, missing):
            tree.add(value, index)
            self._keep(key, kept(asked, tree), finished=False)
            advance(len(asked.blocks[index][1]))
        if missing or before is None:
            self._keep(key, kept(asked, tree), finished=True)
        nodes: Sequence[Any] = self._arrays.mapped(self._store.get(key)["nodes"])
        return nodes

    def _keep(self, key: str, value: Any, finished: bool) -> None:
        """Keep a sum; of one with large arrays at once, or the files that it no longer refers to would pile up."""
        filed = self._arrays.filed(value)
        large = has_filed(filed)
        self._store.put(key, filed, finished=finished or large)
        if large:
            self._arrays.keep(self._store.values())

    def _key(self, asked: Sum) -> str:
        return f"{_SUMS}/{self._measurement}/{asked.name}"


def blocks_of(shard: Shard, count: int) -> range:
    """Return the blocks, of `count`, that a shard sums: a range, so that they make few nodes of the tree."""
    number, of = shard
    return range(count * (number - 1) // of, count * number // of)


def sum_own(network: Network, config: Config, split: SampleSplit, runtime: Runtime, steps: Steps) -> str:
    """Compute a shard's blocks of all sums that can be made yet, and keep them. Returns what to tell the user."""
    missing = ""
    try:
        measure(network, config, split, runtime, steps)
    except StoppedError as error:
        missing = str(error)
    steps.store.flush()
    if missing:
        return f"this shard's sums are kept; the next one, {missing!r}, needs those of all shards"
    return "all sums of this shard are kept; run without --shard to merge"


def share(store: Store, files: CurveFiles, binding: Binding) -> None:
    """Let `store` sum as a shard, or from the parts of all. Raises ConfigError if they do not fit together."""
    parts = {path: _sums(read_values(path, binding), path) for path in files.parts}
    marks = {path: tuple(values[_MARK]) for path, values in parts.items()}
    if files.shard is not None:
        _claim(store, files)
        marks = {files.path or Path(): files.shard, **marks}
    _check(marks, complete=files.shard is None)

    def sums(measurement: str) -> Summation:
        if files.shard is None:
            _check_measurement(parts, measurement)
        return Shards(measurement, files.shard, store, parts)

    store.sums = sums


def _sums(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the sums and the mark of a part."""
    if _MARK not in values:
        raise ConfigError(f"--curves {path}: is not of a shard; give the files of runs with --shard alone")
    return {name: value for name, value in values.items() if name == _MARK or name.startswith(f"{_SUMS}/")}


def _claim(store: Store, files: CurveFiles) -> None:
    """Mark the file of a shard. Raises ConfigError if it is of another one, or of no shard."""
    mark = store.get(_MARK)
    if mark is not None and tuple(mark) != files.shard:
        raise ConfigError(f"--curves {files.path}: is of shard {_text(mark)}; give each shard a file of its own")
    if mark is None and not store.empty:
        raise ConfigError(f"--curves {files.path}: holds a measurement, not a shard's sums; give another file")
    store.put(_MARK, files.shard)


def reject_part(store: Store, path: Path) -> None:
    """Raise ConfigError if the checkpoint is of a shard."""
    mark = store.get(_MARK)
    if mark is not None:
        raise ConfigError(
            f"--curves {path}: is of shard {_text(mark)} alone; give a pattern that matches all, as 'part*.npz'"
        )


def _check(marks: Mapping[Path, Shard], complete: bool) -> None:
    """Check that the shards are of one division, each once; complete: that none is missing. Raises ConfigError."""
    seen: dict[Shard, Path] = {}
    for path, mark in marks.items():
        other = next(iter(seen), mark)
        if mark[1] != other[1]:
            raise ConfigError(
                f"--curves {path}: is shard {_text(mark)}, and {seen[other]} is {_text(other)}; give those of one N"
            )
        if mark in seen:
            raise ConfigError(f"--curves {path}: is shard {_text(mark)}, as {seen[mark]} is; give each shard once")
        seen[mark] = path
    count = next(iter(seen))[1]
    missing = [k for k in range(1, count + 1) if (k, count) not in seen]
    if complete and missing:
        names = ", ".join(f"{k}/{count}" for k in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ConfigError(f"--curves: the file of shard {names} is missing; run it, with --shard")


def _check_measurement(parts: Mapping[Path, Mapping[str, Any]], measurement: str) -> None:
    """Raise ConfigError if the parts have sums, but none of `measurement`."""
    for path, values in parts.items():
        found = {name.split("/")[1] for name in values if name != _MARK}
        if found and measurement not in found:
            raise ConfigError(
                f"--curves {path}: was summed for budgets of another kind ({next(iter(found))}, not {measurement}); "
                "give the --bits of the shards"
            )


def _text(mark: Any) -> str:
    return f"{mark[0]}/{mark[1]}"
