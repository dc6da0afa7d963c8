"""Names and regular expressions with which options select layers and activations."""

import difflib
import re
import warnings
from collections.abc import Iterable


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether `pattern`, a name or a regular expression for a whole name, matches one of `names`."""
    return any(pattern == n or re.fullmatch(pattern, n) for n in names)


def channel_range(pattern: str) -> tuple[str, slice | None]:
    """Split "NAME[2:8]" into NAME and the slice of its channels; any other pattern into itself and None."""
    match = re.fullmatch(r"(.+)\[([0-9]{0,9}):([0-9]{0,9})\]", pattern)
    if not match or not _compiles(match[1]):  # "\\[2:8]" names a bracket
        return pattern, None
    first, last = (int(t) if t else None for t in match.group(2, 3))
    return match[1], slice(first, last)


def pins(pattern: str, names: Iterable[str]) -> bool:
    """Whether a --pin of `pattern` fixes what has one of `names`, or channels of it."""
    return matches(channel_range(pattern)[0], names)


def as_pattern(name: str) -> str:
    """The pattern that matches only `name`."""
    return name if _compiles(name) and channel_range(name)[1] is None else re.escape(name)


def suggestion(pattern: str, names: Iterable[str]) -> str:
    """A hint, for the error message, at what to write instead of a `pattern` that matches none of `names`.

    It says so if the pattern only matches inside a name; patterns match whole names.
    """
    names = list(names)
    wider = f".*({pattern}).*" if "|" in pattern else f".*{pattern}.*"
    inside = any((match := re.search(pattern, n)) and match[0] for n in names)
    if inside and _compiles(wider) and matches(wider, names):
        return f"; a pattern matches whole names: give {wider!r}"
    return nearest(pattern, names)


def nearest(pattern: str, names: Iterable[str]) -> str:
    """A hint, for the error message, at the one of `names` that is closest to `pattern`."""
    closest = difflib.get_close_matches(pattern, list(names), 1, 0.0)
    return f"; the nearest is {closest[0]!r}" if closest else ""


def _compiles(pattern: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets like [[a], which keep their meaning here
        try:
            re.compile(pattern)
        except re.error:
            return False
    return True
