"""The other processes that have files of a folder open, on Linux."""

import contextlib
import os
from pathlib import Path

_PROCESSES = Path("/proc")


def users_of(folder: str) -> list[int]:
    """List the processes, but for this one, that have an open file in `folder` or name it in their command line.

    Empty where the system has no /proc.
    """
    found = []
    for entry in _PROCESSES.glob("[0-9]*"):
        if int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if _uses(entry, folder):
                    found.append(int(entry.name))
    return found


def _uses(process: Path, folder: str) -> bool:
    if folder.encode() in (process / "cmdline").read_bytes():
        return True
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # it has been closed
            if Path(folder) in link.readlink().parents:
                return True
    return False
