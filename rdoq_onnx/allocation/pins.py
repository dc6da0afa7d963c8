"""Restrict curves to the widths that the user pins."""

from collections.abc import Sequence

import numpy as np

from rdoq_onnx.analysis.patterns import channel_range, matches, suggestion
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import ConfigError


def pinned(measurement: Measurement, pins: Sequence[tuple[str, int]]) -> Curves:
    """Restrict pinned layers and activations to their pinned widths.

    A width that a layer does not offer becomes the nearest narrower one; fusion tensors keep theirs. Raises ConfigError
    if there is none, or if a pattern matches nothing.
    """
    distortion = measurement.curves.distortion
    mask = np.ones(distortion.shape, bool)
    for pattern, bits in pins:
        name, channels = channel_range(pattern)
        eligible = [u for u in measurement.units() if channels is None or u.kind == "layer"]
        found = [u for u in eligible if matches(name, u.names)]
        budgeted = [u for u in found if not u.fusion] or found  # a fusion tensor may share the name of its branch
        matching = [(u.names, _part(u.rows, channels)) for u in budgeted]
        if not matching:
            all_names = [n for unit in eligible for n in unit.names]
            raise ConfigError(f"--pin {pattern}={bits} matches no layer or activation{suggestion(name, all_names)}")
        for names, units in matching:
            if units.start >= units.stop:
                raise ConfigError(f"--pin {pattern}={bits}: {names[0]!r} has no such channels; give a range within it")
            offered = np.flatnonzero(np.isfinite(distortion[units]).all(axis=0))
            narrower = offered[offered <= bits]
            if not len(narrower):
                raise ConfigError(
                    f"--pin {pattern}={bits}: {names[0]!r} offers {offered.tolist()} bits; "
                    "give one of them or allow more --widths"
                )
            mask[units] = np.arange(distortion.shape[1]) == narrower[-1]
    return measurement.curves.restrict(mask)


def _part(rows: slice, channels: slice | None) -> slice:
    """Return the rows of `channels` of a layer, of all if None."""
    if channels is None:
        return rows
    first, last, _ = channels.indices(rows.stop - rows.start)
    return slice(rows.start + first, rows.start + last)
