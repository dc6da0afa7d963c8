"""The files behind --curves: a checkpoint, the part of a shard, or a pattern that matches the parts of all shards."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdoq_onnx.errors import ConfigError

Shard = tuple[int, int]  # K of N
_NUMBER = "*"  # stands for the shard's number in a pattern
_WILD = set("*?[")


@dataclass(frozen=True)
class CurveFiles:
    """What a run reads and writes of a measurement.

    path: the file that is written, and read first if it exists; None if there is none. parts: files of shards, which
    are only read. shard: which one the run is, if it is one.
    """

    path: Path | None = None
    parts: tuple[Path, ...] = ()
    shard: Shard | None = None

    @classmethod
    def of(cls, curves: Any, shard: Shard | None = None) -> "CurveFiles":
        """Take a path, a pattern, or None. Raises ConfigError."""
        if isinstance(curves, cls):
            return curves
        if curves is not None and not isinstance(curves, str | Path):
            raise ConfigError(f"curves is a {type(curves).__name__}; give a path")
        if shard is None:
            if curves is None:
                return cls()
            return cls(None, _matching(Path(curves))) if _is_pattern(curves) else cls(Path(curves))
        if curves is None:
            raise ConfigError("--shard needs a file for its sums: --curves PART")
        if not _is_pattern(curves):
            return cls(Path(curves), (), shard)
        text = str(curves)
        if text.count(_NUMBER) != 1 or _WILD & set(text.replace(_NUMBER, "")):
            raise ConfigError(f"--curves {text}: with --shard, one * stands for the shard's number, as in 'part*.npz'")
        own = Path(text.replace(_NUMBER, str(shard[0])))
        others = (Path(text.replace(_NUMBER, str(k + 1))) for k in range(shard[1]))
        return cls(own, tuple(path for path in others if path != own and path.exists()), shard)


def parse_shard(text: str) -> Shard:
    """Parse "3/16". Raises ConfigError."""
    parts = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    shard = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"--shard {text!r}: give K/N, the K-th of N shards, such as 3/16")
    return shard


def _is_pattern(curves: str | Path) -> bool:
    return bool(_WILD & set(str(curves))) and not Path(curves).is_file()


def _matching(pattern: Path) -> tuple[Path, ...]:
    """Return the files that a pattern matches, in the order of their names; wild cards may be in any folder of it."""
    anchor = Path(pattern.anchor)
    found = tuple(sorted(path for path in anchor.glob(str(pattern.relative_to(anchor))) if path.is_file()))
    if not found:
        raise ConfigError(f"--curves '{pattern}': no file matches; run the shards first, with --shard")
    return found
