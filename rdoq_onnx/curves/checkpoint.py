"""Checkpoint of a measurement: the results so far, by name, in a file (`--curves FILE`).

The file is an .npz. Its `header` is JSON with the format's version, the binding (hashes of the model and the samples,
settings) and the values as written by `system/encoding.py`. The other members hold their arrays, one member per dtype,
since members are slow to open. Each write replaces the whole file, so that it is complete even if a run is killed.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.candidates.table_rows import TableRows
from rdoq_onnx.curves.binding import VERSION, Binding
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import BlockOption, FloatFallback, MeasuredActivation, MeasuredLayer
from rdoq_onnx.curves.part_arrays import Filed
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.layers import Activation, Layer, Use
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.observation.distortion import Metric, Rows
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.parts import Part, Piece
from rdoq_onnx.observation.tail_model import ExtremeValues, Tail
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.system import io
from rdoq_onnx.system.encoding import Arrays, decode, encode, packed, unpacked
from rdoq_onnx.system.progress import Advance, Progress, Unfinished
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.system.summation import Compute, Summation, here
from rdoq_onnx.version import __version__

FORMAT = "rdoq-onnx curves"
_SHARE = 20  # writing unfinished values may take 1 / _SHARE of the time
_PAUSE = 10.0  # minimum seconds between two of these writes

# Classes that a file may hold. Their names and field names are the file format: after a rename, raise VERSION.
CLASSES = {
    c.__name__: c
    for c in (
        *(Activation, ActivationCandidates, Affine, Batching, BlockOption, Candidates, Curves, Distortions),
        *(ExtremeValues, Filed, FloatFallback, Layer, LayerCandidates, Linear, MeasuredActivation, MeasuredLayer),
        *(Metric, Observation, Part, Piece, Rows, SpooledCodes, TableRows, Tail, Use, WeightCodes),
    )
}

T = TypeVar("T")
Array = NDArray[Any]


class Store:
    """Values by name, also kept in a file if there is one. scratch: for large arrays.

    compute: what computes blocks of sums over samples. sums: what adds those of a measurement, by its name.
    """

    def __init__(
        self, path: Path | None = None, binding: Binding | None = None, scratch: Scratch | None = None
    ) -> None:
        self.scratch = scratch or Scratch()
        self._file = (path, binding) if path is not None and binding is not None else None
        self._values: dict[str, Any] = {}
        self._next = 0.0
        self._written = True
        self.compute: Compute = here
        self.sums: Callable[[str], Summation] = lambda _: Summation(self.compute, self.scratch.park)

    @classmethod
    def open(cls, path: str | Path, binding: Binding, scratch: Scratch | None = None) -> "Store":
        """Open the store at `path`, empty if there is no file. Raises ConfigError if the file has another binding."""
        store = cls(Path(path), binding, scratch)
        if Path(path).exists():
            store._values = read_values(Path(path), binding)
        store.scratch.bind(binding.identity)  # of a file of another measurement, the folder stays as it is
        return store

    @property
    def kept(self) -> bool:
        """Whether there is a file, for later runs."""
        return self._file is not None

    @property
    def empty(self) -> bool:
        return not self._values

    def values(self) -> Iterable[Any]:
        """Return all values."""
        return self._values.values()

    def get(self, name: str) -> Any:
        """Return the value of `name`, or None."""
        return self._values.get(name)

    def put(self, name: str, value: Any, *, finished: bool = True) -> None:
        """Keep `value`; unless `finished`, it is written to disk only from time to time."""
        self._values[name], self._written = value, False
        if finished or time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write values that are not on disk yet."""
        if self._file is not None and not self._written:
            begin = time.monotonic()
            _write(*self._file, self._values)
            end = time.monotonic()
            self._next, self._written = end + max(_PAUSE, _SHARE * (end - begin)), True

    def drop(self, name: str) -> None:
        """Drop all values whose name starts with `name`; the file follows with the next `put`."""
        self._values = {key: value for key, value in self._values.items() if not key.startswith(name)}


@dataclass(frozen=True)
class Steps:
    """Steps of the measurement `name`, whose results a store keeps and reuses."""

    store: Store
    progress: Progress
    name: str

    def sums(self) -> Summation:
        """Return what adds sums over samples."""
        return self.store.sums(self.name)

    def unsharded(self) -> Summation:
        """Return what adds sums that come after those of shards."""
        return Summation(self.store.compute, self.store.scratch.park)

    def get(self, step: str) -> Any:
        return self.store.get(f"{self.name}/{step}")

    def put(self, step: str, value: Any, *, finished: bool = True) -> None:
        self.store.put(f"{self.name}/{step}", value, finished=finished)

    def step(self, name: str, total: int, compute: Callable[[Advance], T]) -> T:
        """Return the kept result of the step `name`, or compute it in `total` parts and keep it."""
        result: T | None = self.get(name)
        if result is None:
            with self.progress.step(name, total) as advance:
                result = compute(advance)
            self.put(name, result)
        return result

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """Return the kept result, or compute and keep it; shows no step, and reaches the disk with the next `flush`."""
        result: T | None = self.get(name)
        if result is None:
            result = compute()
            self.put(name, result, finished=False)
        return result

    def unfinished(self, step: str) -> Unfinished:
        return _Kept(self, f"{step}, so far")

    def finish(self, step: str, value: Any) -> None:
        """Keep only `value`, the result of the measurement."""
        self.store.drop(f"{self.name}/")
        self.put(step, value)


@dataclass(frozen=True)
class _Kept(Unfinished):
    steps: Steps
    name: str

    def get(self) -> Any:
        return self.steps.get(self.name)

    def put(self, value: Any) -> None:
        self.steps.put(self.name, value, finished=False)


def _write(path: Path, binding: Binding, values: Mapping[str, Any]) -> None:
    arrays: Arrays = []
    header = {
        "format": FORMAT,
        "version": VERSION,
        "program": __version__,
        "model": binding.model,
        "samples": binding.samples,
        "settings": binding.settings,
        "values": {name: encode(value, arrays, CLASSES) for name, value in values.items()},
    }
    header["arrays"], members = packed(arrays)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    io.write_arrays({"header": text, **members}, path)


def read_values(path: Path, binding: Binding) -> dict[str, Any]:
    """Read the values of a file by name. Raises ConfigError if it cannot be read or has another binding."""
    try:
        stored = io.read_npz(path)
        header = json.loads(stored["header"].tobytes())
        if header["format"] != FORMAT:
            raise ValueError("not a curves file")
        _check(path, header, binding)
        arrays = unpacked(header["arrays"], stored)
        return {name: decode(tree, arrays, CLASSES) for name, tree in header["values"].items()}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--curves {path}: cannot be read ({error.strerror or error}); give another file") from error
    except Exception as error:  # numpy, zipfile and json may raise anything on arbitrary bytes
        raise ConfigError(
            f"--curves {path}: is not a curves file or is damaged; delete it or give another --curves file"
        ) from error


def _check(path: Path, header: Mapping[str, Any], binding: Binding) -> None:
    """Raise ConfigError if the file has another binding, naming the difference."""
    where, fix = f"--curves {path}", "give another --curves file or delete this one"
    if header["version"] != VERSION:
        raise ConfigError(f"{where}: has format {header['version']}, this program reads {VERSION}; {fix}")
    if header["program"] != __version__:
        raise ConfigError(f"{where}: was written by rdoq-onnx {header['program']}, this is {__version__}; {fix}")
    if header["model"] != binding.model:
        raise ConfigError(f"{where}: was measured on another model; {fix}")
    for name, value in binding.settings.items():
        before = header["settings"].get(name)
        if before != value:
            option = "--" + {"exclude_ops": "exclude-op"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"{where}: was measured with {option} {_text(before)}, not {_text(value)}; {fix}")
    if header["samples"] != binding.samples:
        raise ConfigError(f"{where}: was measured on other samples (--calibration, --samples, --image-...); {fix}")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
