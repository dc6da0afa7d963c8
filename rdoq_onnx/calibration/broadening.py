"""Copies of samples with some ids replaced at random, for what samples of one kind do not show.

A network that looks ids up in a table treats ids that the samples lack as well. Statistics of such copies need no data
of other kinds: half of the ids give way to any row of the table, while those that most samples have, such as the marks
at both ends and padding, stay in their place. Samples that show all ids of their source need none: the chance that the
next id is a new one is about the share of ids that occur once (Good, Biometrika 1953).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples

MOST = 256  # samples that are copied
_REPLACED = 0.5  # share of the ids
_COMMON = 0.5  # share of the samples that have an id that stays
_NEW = 0.05  # chance of a new id up to which samples show enough of their source

Array = NDArray[Any]


def broadened(samples: Samples, tables: Mapping[str, int], seed: int) -> Samples:
    """Return `samples` with copies of some; as they are if they show most ids of their source.

    tables: the number of rows of the table that each input looks ids up in.
    """
    lacking, parts = _lacking(samples, tables)
    if not lacking:
        return samples
    kept = {name: _common([p[name] for p in parts]) for name in lacking}
    rng = np.random.default_rng([seed, len(samples)])
    copies = [
        {n: _replaced(rng, v, lacking[n], kept[n]) if n in lacking else v for n, v in p.items() if n in samples.arrays}
        for p in parts
    ]
    own = [{n: v for n, v in p.feeds(slice(None)).items() if n in samples.arrays} for p in samples.by_shape()]
    first, *others = [*own, *copies]
    return replace(samples, arrays=first, picked=None, others=tuple(others), labels=None)


def narrow_inputs(samples: Samples, tables: Mapping[str, int]) -> dict[str, int]:
    """Return those of `tables` of whose ids the samples show too few."""
    return _lacking(samples, tables)[0]


def _lacking(samples: Samples, tables: Mapping[str, int]) -> tuple[dict[str, int], list[dict[str, Array]]]:
    """Return `narrow_inputs`, and the feeds of each shape that show it."""
    inputs = {name: rows for name, rows in tables.items() if name in samples.arrays}
    if not inputs or not len(samples) or samples.batch is not None or samples.rows > 1:
        return {}, []
    parts = [part.feeds(slice(None)) for part in samples.some(MOST).by_shape()]
    return {name: rows for name, rows in inputs.items() if _chance([p[name] for p in parts]) > _NEW}, parts


def _chance(values: list[Array]) -> float:
    """Return the chance that a further id is a new one."""
    ids = np.concatenate([value.ravel() for value in values])
    counts = np.unique(ids, return_counts=True)[1]
    return float((counts == 1).sum()) / max(len(ids), 1)


def _common(values: list[Array]) -> Array:
    """Return the ids that at least a share of `_COMMON` of the samples have."""
    each = np.concatenate([np.unique(row) for value in values for row in value])
    found, counts = np.unique(each, return_counts=True)
    return np.asarray(found[counts >= _COMMON * sum(map(len, values))])


def _replaced(rng: np.random.Generator, ids: Array, rows: int, kept: Array) -> Array:
    drawn = rng.integers(0, rows, ids.shape, ids.dtype)
    return np.where((rng.random(ids.shape) < _REPLACED) & ~np.isin(ids, kept), drawn, ids)
