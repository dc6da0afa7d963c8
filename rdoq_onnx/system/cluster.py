"""Processes that compute blocks of sums for a run: on this machine, or on a Ray cluster. The only module with Ray.

What all blocks of a sum share goes to the object store once, and from there to each node that computes some; the
samples of a block go with it. Of weights in files of their own, a node that reads the same file takes that, and any
other a copy of its bytes, once (`_Weights`). A process keeps what it has loaded for the next block of the same sum.

A process that dies is replaced by Ray, and its block is computed again; nodes that join take blocks as soon as they are
there.
"""

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rdoq_onnx import errors
from rdoq_onnx.calibration.blocks import Block
from rdoq_onnx.errors import ClusterError, ConfigError, RdoqError
from rdoq_onnx.model.external import Place, bytes_at, place
from rdoq_onnx.system.summation import Compute, Sum, Work, here
from rdoq_onnx.system.threads import cores
from rdoq_onnx.version import __version__

_RETRIES = 8  # of a block whose process dies
_WAIT = 2.0  # seconds after which nodes that have joined get blocks
_AHEAD = 2  # blocks given out for each process
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


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
    folder: str = field(default="", init=False)

    @property
    def local(self) -> bool:
        """Whether its processes are on this machine alone."""
        return self.workers.isdigit()

    @cached_property
    def ray(self) -> Any:
        """The connection, made with the first sum. Raises ClusterError."""
        os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
        if self.local:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
            self.folder = tempfile.mkdtemp(prefix="rdoq-ray-")
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        import ray  # here: it takes a second, and only runs with workers need it

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.local:
            options |= {"num_cpus": int(self.workers), "include_dashboard": False, "_temp_dir": self.folder}
        else:
            options |= {"address": self.workers}
        try:
            ray.init(**options)
        except Exception as error:  # of many kinds: no such host, another version of Ray or Python, no rights
            raise ClusterError(f"--workers {self.workers}: Ray does not start ({_first_line(error)})") from error
        _Weights.register(ray)
        return ray

    def leave(self) -> None:
        """Free what this run made, on all nodes."""
        if "ray" in self.__dict__:
            with contextlib.suppress(Exception):  # the run is over, and the cluster may be gone
                self._clean()
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
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            raise ClusterError(
                f"--workers {self.workers}: the Ray cluster is lost, or a process dies again and again "
                f"({_first_line(error)}); with --curves a new run goes on from there"
            ) from error

    def _compute(self, asked: Sum, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        ray, waiting, running = self.ray, list(reversed(indices)), dict[Any, int]()
        shared = [[ray.put(work)] for work in asked.works]  # in a list, so that a process reads it only once
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

        clean = ray.remote(_remove_copies).options(num_cpus=0, max_retries=0)
        tasks = [clean.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote(_RUN) for n in self._nodes]
        ray.wait(tasks, num_returns=len(tasks), timeout=5)


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


def _sum_block(shared: list[Any], block: Block, version: str) -> tuple[Any, _Failure | None]:
    """Compute the sum of a block in a process of the cluster."""
    global _loaded
    import ray

    if version != __version__:
        return None, _failure(ConfigError(f"has rdoq-onnx {__version__}, this run {version}; install the same there"))
    try:
        (reference,) = shared
        key = reference.hex()
        if _loaded is None or _loaded[0] != key:
            _loaded = None  # its session frees its memory before the next one takes its own
            work: Work = ray.get(reference)
            _loaded = (key, work.loaded())
        return _loaded[1](block), None
    except (RdoqError, ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        return None, _failure(error)


def _failure(error: Exception) -> _Failure:
    return _Failure(type(error).__name__, _first_line(error), f"{socket.gethostname()} (process {os.getpid()})")


_RUN = secrets.token_hex(8)  # names the copies of weights that this run makes on other nodes


@dataclass(frozen=True)
class _Weights:
    """Weights of a model in a file: where they are on the machine of the run, and their bytes in the object store."""

    where: Place
    mark: tuple[int, ...]
    bytes: Any
    run: str

    @classmethod
    def register(cls, ray: Any) -> None:
        """Let models travel with the weights that they have in files, each file once."""
        known: dict[Place, _Weights] = {}

        def packed(model: onnx.ModelProto) -> tuple[bytes, list[tuple[int, _Weights]]]:
            weights = []
            for k, tensor in enumerate(model.graph.initializer):
                where = Place.of(tensor)
                if where is not None:
                    if where not in known:
                        known[where] = cls(where, _mark(where.path), ray.put(bytes_at(where)), _RUN)
                    weights.append((k, known[where]))
            return model.SerializeToString(), weights

        ray.util.register_serializer(onnx.ModelProto, serializer=packed, deserializer=_unpacked)

    def at(self) -> Place:
        """Return where the weights are on the machine of this process."""
        with contextlib.suppress(OSError):
            if _mark(self.where.path) == self.mark:
                return self.where
        path = _copies(self.run) / f"{self.bytes.hex()}.weights"
        if not path.exists():
            import ray

            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(np.asarray(ray.get(self.bytes)).data)
            part.replace(path)
        return Place(os.fspath(path), 0, self.where.length)


def _unpacked(packed: tuple[bytes, list[tuple[int, _Weights]]]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.ParseFromString(packed[0])
    for k, weights in packed[1]:
        place(model.graph.initializer[k], weights.at())
    return model


def _mark(path: str) -> tuple[int, ...]:
    """Return what two machines that share a file agree on, and what no two files have in common."""
    found = Path(path).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _copies(run: str) -> Path:
    return Path(tempfile.gettempdir(), f"rdoq-onnx-{run}")


def _remove_copies(run: str) -> None:
    shutil.rmtree(_copies(run), ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
