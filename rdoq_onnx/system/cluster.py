"""Processes that compute blocks of sums for a run: on this machine, or on a Ray cluster. The only module that
imports Ray.

What all blocks of a sum share goes to the object store once, and from there to each node that computes some; the
samples of a block go with it. Of weights in files of their own, a node that reads the same file takes that, and any
other a copy of its bytes, once (shipping.py). A process keeps what it has loaded for the next block of the same sum.

A process that dies is replaced by Ray, and its block is computed again; nodes that join take blocks as soon as they are
there.
"""

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rdoq_onnx import errors
from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.errors import ClusterError, ConfigError, RdoqError
from rdoq_onnx.system.shipping import RUN, Sender, Weights, remove_copies, unpacked
from rdoq_onnx.system.summation import Compute, Sum, Work, here
from rdoq_onnx.system.threads import cores
from rdoq_onnx.version import __version__

_RETRIES = 8  # of a block whose process dies
_WAIT = 2.0  # seconds after which nodes that have joined get blocks
_AHEAD = 2  # blocks given out for each process
_LONGEST = 32  # letters of the folder of a socket, whose path may have 107
_QUIET = {
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextlib.contextmanager
def computing(workers: str | None, threads: int) -> Iterator[Compute]:
    """Yield what computes sums with `workers` (see Config), which start with the first sum; None for this process.

    Raises ConfigError if Ray is not installed.
    """
    if workers is None:
        yield here
        return
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"--workers {workers} needs the package ray: pip install 'rdoq-onnx[ray]'")
    cluster = _Cluster(workers, threads)
    try:
        yield cluster.compute
    finally:
        cluster.leave()


@dataclass
class _Cluster:
    """A connection to Ray. threads: of each block, as in a run of one process; 0 for the cores of this machine."""

    workers: str
    threads: int
    connected: bool = field(default=False, init=False)
    sender: Sender = field(init=False)
    folder: str = field(default="", init=False)

    @property
    def local(self) -> bool:
        """Whether its processes are on this machine alone."""
        return self.workers.isdigit()

    @cached_property
    def ray(self) -> Any:
        """The connection, made with the first sum; that of the caller's program, if it has one. Raises ClusterError."""
        os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
        if "ray" not in sys.modules:  # which reads these when it is imported
            os.environ.update(self._authentication())
        import ray  # here: it takes a second, and only runs with workers need it

        self.connected = not ray.is_initialized()
        if self.connected:
            try:
                with _in_folder(tempfile.gettempdir()):
                    ray.init(**self._options(), log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # of many kinds: no such host, another version of Ray or Python, no rights
                raise ClusterError(f"--workers {self.workers}: Ray does not start ({_first_line(error)})") from error
        self.sender = Sender(ray)
        with contextlib.suppress(AttributeError):  # it prints on stdout whenever a process dies
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
        return ray

    def _authentication(self) -> dict[str, str]:
        """Return what keeps others out of processes of this machine; else it is the cluster's own affair."""
        if self.local:
            return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        return {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}

    def _options(self) -> dict[str, Any]:
        if not self.local:
            return {"address": self.workers}
        short = len(tempfile.gettempdir()) <= _LONGEST or os.name != "posix"
        self.folder = tempfile.mkdtemp(prefix="rdoq-ray-", dir=None if short else "/tmp")
        return {"num_cpus": int(self.workers), "include_dashboard": False, "_temp_dir": self.folder}

    def leave(self) -> None:
        """Free what this run made, on all nodes."""
        if "ray" in self.__dict__:
            with contextlib.suppress(Exception):  # the run is over, and the cluster may be gone
                self._clean()
            if self.connected:
                with contextlib.suppress(Exception):
                    self.ray.shutdown()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def compute(self, asked: Sum, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Compute the sums of blocks, as `here` does. Raises ClusterError if the cluster is lost."""
        try:
            yield from self._compute(asked, indices)
        except RdoqError:
            raise
        except self.ray.exceptions.RayTaskError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ClusterError(
                f"--workers {self.workers}: a process fails ({reason}); install the same rdoq-onnx on all nodes"
            ) from error
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            raise ClusterError(
                f"--workers {self.workers}: the Ray cluster is lost, or a process dies again and again "
                f"({_first_line(error)}); with --curves a new run goes on from there"
            ) from error

    def _compute(self, asked: Sum, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        ray, waiting, running = self.ray, list(reversed(indices)), dict[Any, int]()
        shared = [self.sender.packed(work) for work in asked.works]  # in a tuple, which a process need not read again
        task = ray.remote(_sum_block).options(num_cpus=self._cpus, max_retries=_RETRIES)
        while waiting or running:
            while waiting and len(running) < _AHEAD * self._slots:
                index = waiting.pop()
                work, block = asked.blocks[index]
                running[task.remote(shared[work], block.loaded(), __version__)] = index
            done, _ = ray.wait(list(running), num_returns=1, timeout=_WAIT)
            for reference in done:
                value, failure = ray.get(reference)
                if failure is not None:
                    raise failure.error()
                yield running.pop(reference), value

    @property
    def _cpus(self) -> int:
        """The CPUs that Ray reserves for a block: those of its threads, as far as a node has them."""
        if self.local:
            return 1
        largest = max((node["Resources"].get("CPU", 0) for node in self._nodes), default=1)
        return int(min(self.threads or cores(), max(largest, 1)))

    @property
    def _slots(self) -> int:
        """The number of blocks that run at once."""
        each = self._cpus
        return max(sum(int(node["Resources"].get("CPU", 0)) // each for node in self._nodes), 1)

    @property
    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _clean(self) -> None:
        """Remove the copies of weights on other nodes."""
        if self.local:
            return
        ray = self.ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        clean = ray.remote(remove_copies).options(num_cpus=0, max_retries=0)
        tasks = [clean.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote(RUN) for n in self._nodes]
        ray.wait(tasks, num_returns=len(tasks), timeout=5)


@contextlib.contextmanager
def _in_folder(folder: str) -> Iterator[None]:
    """Work in `folder` meanwhile: processes of Ray import from where the run was when it connected."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class _Failure:
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


_loaded: tuple[str, Callable[[Block], Any]] | None = None  # of the last sum that this process computed for


def _sum_block(shared: tuple[Any, list[Weights]], block: Block, version: str) -> tuple[Any, _Failure | None]:
    """Compute the sum of a block in a process of the cluster."""
    global _loaded
    import ray

    if version != __version__:
        return None, _failure(ConfigError(f"has rdoq-onnx {__version__}, this run {version}; install the same there"))
    try:
        reference, weights = shared
        key = reference.hex()
        if _loaded is None or _loaded[0] != key:
            _loaded = None  # its session frees its memory before the next one takes its own
            work: Work = unpacked(ray.get(reference), weights, ray.get)
            _loaded = (key, work.loaded())
        return _loaded[1](block), None
    except (RdoqError, ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        return None, _failure(error)


def _failure(error: Exception) -> _Failure:
    return _Failure(type(error).__name__, _first_line(error), f"{socket.gethostname()} (process {os.getpid()})")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
