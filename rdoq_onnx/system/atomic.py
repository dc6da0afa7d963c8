"""Write files atomically: whole or not at all, even on a full disk, a kill or a concurrent run."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rdoq_onnx.errors import OutputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

SHOWN = 300  # characters kept of another library's message


@contextlib.contextmanager
def atomic(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Yield temporary files that are renamed to `paths`, in this order, once all are complete and on the disk.

    A symbolic link stays, and the file that it leads to is replaced. Raises OutputError.
    """
    paths = tuple(map(followed, paths))
    temporaries = [path.parent / f".rdoq-{secrets.token_hex(8)}.tmp" for path in paths]
    try:
        with contextlib.ExitStack() as stack:  # open() applies the umask, unlike mkstemp
            files: list[BinaryIO] = [stack.enter_context(t.open("xb")) for t in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for path in paths:
            if path.is_dir():
                raise OutputError(f"{path}: is a folder; give the path of a file")
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
        _sync(paths[0].parent)
    except (OSError, ValueError) as error:
        raise OutputError(f"{paths[-1]}: cannot be written ({reason(error)}); choose another path") from error
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink()


def followed(path: Path) -> Path:
    """Return what `path` leads to if it is a symbolic link, and `path` otherwise. Raises OutputError for a loop."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError, ValueError) as error:  # a loop is a RuntimeError up to Python 3.12
        raise OutputError(f"{path}: is not a usable path ({reason(error)}); choose another") from error


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make other runs that write to `folder` wait, where the system supports it; the lock ends with the process."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ValueError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def reason(error: Exception) -> str:
    """Another library's message, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:SHOWN].rstrip(".;") or type(error).__name__


def _sync(folder: Path) -> None:
    """Make a rename durable; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
