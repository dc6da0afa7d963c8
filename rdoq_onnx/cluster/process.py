"""What the processes of a Ray cluster run, where they import from, and what tells the run of an error."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdoq_onnx import errors
from rdoq_onnx.cluster.shipping import Weights, unpacked
from rdoq_onnx.errors import ClusterError, ConfigError, RdoqError
from rdoq_onnx.system.summation import Work
from rdoq_onnx.system.threads import limit_blas
from rdoq_onnx.version import __version__


@dataclass(frozen=True)
class Failure:
    """What went wrong in a process, and where."""

    kind: str
    text: str
    where: str

    def error(self) -> RdoqError:
        """Return the error of this run: of the same class if it is one of ours."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, RdoqError):
            return kind(f"worker {self.where}: {self.text}")
        return ClusterError(f"worker {self.where}: {self.kind}: {self.text}")


_loaded: tuple[str, Callable[[Any], Any]] | None = None  # of the last sum that this process computed for


def sum_block(shared: tuple[Any, list[Weights]], part: Any, version: str) -> tuple[Any, Failure | None]:
    """Compute the sum of a block, or another part of a work, in a process of the cluster."""
    global _loaded
    import ray

    if version != __version__:
        return None, _failure(ConfigError(f"has rdoq-onnx {__version__}, this run {version}; install the same there"))
    limit_blas()
    try:
        reference, weights = shared
        key = reference.hex()
        if _loaded is None or _loaded[0] != key:
            _loaded = None  # its session frees its memory before the next one takes its own
            work: Work = unpacked(ray.get(reference), weights, ray.get)
            _loaded = (key, work.loaded())
        return _loaded[1](part), None
    except (RdoqError, ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        return None, _failure(error)


def _failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, first_line(error), f"{socket.gethostname()} (process {os.getpid()})")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def in_folder(folder: str) -> Iterator[None]:
    """Work in `folder` meanwhile: processes of Ray import from where the run was when it connected."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
