"""Names and regular expressions with which options select layers and activations."""

import difflib
import re
from collections.abc import Iterable


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether `pattern`, a name or a regular expression for a whole name, matches one of `names`."""
    return any(pattern == n or re.fullmatch(pattern, n) for n in names)


def channel_range(pattern: str) -> tuple[str, slice | None]:
    """Split "NAME[2:8]" into NAME and the slice of its channels; any other pattern into itself and None."""
    match = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", pattern)
    if not match:
        return pattern, None
    first, last = (int(t) if t else None for t in match.group(2, 3))
    return match[1], slice(first, last)


def as_pattern(name: str) -> str:
    """The pattern that matches only `name`."""
    try:
        re.compile(name)
    except re.error:
        return re.escape(name)
    return re.escape(name) if channel_range(name)[1] is not None else name


def nearest(pattern: str, names: Iterable[str]) -> str:
    """A hint, for the error message, at the one of `names` that is closest to `pattern`."""
    closest = difflib.get_close_matches(pattern, list(names), 1, 0.0)
    return f"; the nearest is {closest[0]!r}" if closest else ""
