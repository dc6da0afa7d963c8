"""Names and regular expressions by which options choose layers and activations."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rdoq_onnx.errors import ConfigError


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


@dataclass(frozen=True)
class Excludes:
    """The patterns of --exclude and types of --exclude-op, and what was asked of them."""

    patterns: tuple[str, ...]
    types: tuple[str, ...]
    _matched: set[str] = field(default_factory=set)
    _names: dict[str, None] = field(default_factory=dict)
    _types: dict[str, None] = field(default_factory=dict)

    def reason(self, op_type: str, names: Iterable[str]) -> str:
        """Why a node known by `names` is to stay in float; empty if it is not."""
        names = tuple(names)
        self._names.update(dict.fromkeys(names))
        self._types[op_type] = None
        found = [p for p in self.patterns if matches(p, names)]
        self._matched.update(found)
        if op_type in self.types:
            return "excluded by --exclude-op"
        return "excluded by --exclude" if found else ""

    def check(self) -> None:
        """Raise ConfigError for a pattern or type that nothing matched."""
        for pattern in self.patterns:
            if pattern not in self._matched:
                raise ConfigError(f"--exclude {pattern!r} matches no layer{nearest(pattern, self._names)}")
        for kind in self.types:
            if kind not in self._types:
                raise ConfigError(f"--exclude-op {kind!r} is the type of no layer{nearest(kind, self._types)}")
