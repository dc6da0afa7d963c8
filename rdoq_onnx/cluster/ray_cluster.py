"""Processes that compute blocks of sums for a run: on this machine, or on a Ray cluster. The only module that
imports Ray.

What all blocks of a sum share goes to the object store once, and from there to each node that computes some; the
samples of a block go with it. Of weights in files of their own, a node that reads the same file takes that, and any
other a copy of its bytes, once (shipping.py). A process keeps what it has loaded for the next block of the same sum.

A process that dies is replaced by Ray, and its block is computed again; nodes that join take blocks as soon as they are
there.
"""

import atexit
import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rdoq_onnx.cluster.folder_users import users_of
from rdoq_onnx.cluster.process import first_line, in_folder, sum_block
from rdoq_onnx.cluster.shipping import RUN, Sender, remove_copies
from rdoq_onnx.errors import ClusterError, ConfigError, LostError, RdoqError
from rdoq_onnx.system.interrupts import AT_ONCE
from rdoq_onnx.system.summation import Compute, Sum, here
from rdoq_onnx.system.threads import cores
from rdoq_onnx.version import __version__

_RETRIES = 8  # of a block whose process dies
_WAIT = 2.0  # seconds after which nodes that have joined get blocks
_ON = "with --curves a new run goes on from there"
_CALLS = 3  # without an answer, and the head is lost
_TRIES = 15  # to remove a folder
_STARTS = 3  # of Ray, which gives its processes half a minute
_SLOW = "timed out during startup"
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
    except KeyboardInterrupt:
        cluster.kill()
        raise
    finally:
        cluster.leave()


@dataclass
class _Cluster:
    """A connection to Ray. threads: of each block, as in a run of one process; 0 for the cores of this machine."""

    workers: str
    threads: int
    connected: bool = field(default=False, init=False)
    lost: bool = field(default=False, init=False)
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
            self._connect(ray)
        self.sender = Sender(ray)
        with contextlib.suppress(AttributeError):  # it prints on stdout whenever a process dies
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
        return ray

    def _connect(self, ray: Any) -> None:
        """Start Ray, again if a busy machine is too slow for it; or join a cluster. Raises ClusterError."""
        for left in reversed(range(_STARTS if self.local else 1)):
            try:
                with in_folder(tempfile.gettempdir()):
                    ray.init(**self._options(), log_to_driver=False, logging_level=logging.ERROR)
                return
            except Exception as error:  # of many kinds: no such host, another version of Ray or Python, no rights
                self._end(ray.shutdown)
                if not left or _SLOW not in str(error):
                    found = " ".join(str(error).split())[:300]
                    raise ClusterError(f"--workers {self.workers}: Ray does not start ({found})") from error

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
        AT_ONCE.append(self.kill)
        return {"num_cpus": int(self.workers), "include_dashboard": False, "_temp_dir": self.folder}

    def kill(self) -> None:
        """Kill the processes on this machine, which would take seconds to end by themselves."""
        if self.folder:
            self.lost = True
            for process in users_of(self.folder):
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            for _ in range(_TRIES):  # until they have ended
                shutil.rmtree(self.folder, ignore_errors=True)
                if not Path(self.folder).exists():
                    break
                time.sleep(0.02)

    def leave(self) -> None:
        """Free what this run made, on all nodes."""

        def disconnect() -> None:
            self._clean()
            if self.connected:
                self.ray.shutdown()

        self._end(disconnect if "ray" in self.__dict__ and not self.lost else lambda: None)

    def _end(self, disconnect: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):  # the run is over, and the cluster may be gone
            disconnect()
        if self.folder:
            AT_ONCE.remove(self.kill)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = ""

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
            found = f"is lost, or a process dies again and again ({first_line(error)})"
            raise ClusterError(f"--workers {self.workers}: the Ray cluster {found}; {_ON}") from error

    def _compute(self, asked: Sum, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        ray, waiting, running = self.ray, list(reversed(indices)), dict[Any, int]()
        shared = self.sender.shared(asked.works)  # in tuples, which a process need not read again
        task = ray.remote(sum_block).options(num_cpus=self._cpus, max_retries=_RETRIES)
        while waiting or running:
            while waiting and len(running) < _AHEAD * self._slots:
                index = waiting.pop()
                work, block = asked.blocks[index]
                running[task.remote(shared[work], block.loaded(), __version__)] = index
            done, _ = ray.wait(list(running), num_returns=1, timeout=_WAIT)
            if not done:
                self._check_head()
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

    def _check_head(self) -> None:
        """Raise LostError if the head does not answer: Ray would end the process, in a minute."""
        if self.workers.startswith("ray://"):
            return  # the client raises it
        address, port = self.ray.get_runtime_context().gcs_address.rsplit(":", 1)
        for left in reversed(range(_CALLS)):
            try:
                socket.create_connection((address, int(port)), timeout=_WAIT).close()
                return
            except OSError as error:
                if not left:
                    self.lost = True
                    atexit.unregister(self.ray.shutdown)  # which would wait for the head
                    found = f"no answer from its head at {address}:{port}"
                    raise LostError(f"--workers {self.workers}: the Ray cluster is lost ({found}); {_ON}") from error
            time.sleep(_WAIT)

    def _clean(self) -> None:
        """Remove the copies of weights on other nodes."""
        if self.local:
            return
        ray = self.ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        clean = ray.remote(remove_copies).options(num_cpus=0, max_retries=0)
        tasks = [clean.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote(RUN) for n in self._nodes]
        ray.wait(tasks, num_returns=len(tasks), timeout=5)
