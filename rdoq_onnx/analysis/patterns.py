"""Names and regular expressions by which options choose layers and activations."""

import difflib
import re
from collections.abc import Iterable


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether `pattern`, a name or a regular expression for a whole name, fits one of `names`."""
    return any(pattern == n or re.fullmatch(pattern, n) for n in names)


def channel_range(pattern: str) -> tuple[str, slice | None]:
    """"NAME[2:8]" -> NAME and its channels 2 to 7; any other pattern -> itself and None."""
    found = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", pattern)
    if not found:
        return pattern, None
    first, last = (int(t) if t else None for t in found.group(2, 3))
    return found[1], slice(first, last)


def as_pattern(name: str) -> str:
    """The pattern that matches just `name`."""
    try:
        re.compile(name)
    except re.error:
        return re.escape(name)
    return re.escape(name) if channel_range(name)[1] is not None else name


def nearest(pattern: str, names: Iterable[str]) -> str:
    """What to say of a pattern that matches none of `names`."""
    found = difflib.get_close_matches(pattern, list(names), 1, 0.0)
    return f"; the nearest is {found[0]!r}" if found else ""
