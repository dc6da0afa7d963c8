"""How much memory the machine has for this process."""

import contextlib
import os
from pathlib import Path

_SHARE = 3  # a run may take 1 / _SHARE of the machine's memory unless told otherwise
_UNKNOWN = 8 << 30
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_bound(asked: int | None) -> int:
    """Return the bytes that a run should not exceed: those `asked` for, or a share of the machine's."""
    return asked or machine_memory() // _SHARE


def machine_memory() -> int:
    """Return the bytes of memory, or of the container's share of it."""
    total = _UNKNOWN
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on Windows
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP:
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            total = min(total, int(path.read_text()))
    return total
