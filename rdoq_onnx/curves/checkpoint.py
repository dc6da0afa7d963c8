"""What has been measured so far, by name, kept in a file as the measurement goes on (`--curves FILE`).

The file is an .npz: `header` is JSON with the format's version, what the measurement is bound to (hashes of the model
and the samples, settings) and the values as `encoding.py` writes them; the other members are their arrays, of a dtype
in one: members are slow to open. It is replaced as a whole each time, so that it is complete whenever a run is killed.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.candidates.candidates import ActivationCandidates, Candidates, LayerCandidates
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import MeasuredActivation, MeasuredLayer, Unheld
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.model.layers import Activation, Layer, Use
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.observation.tail_model import Tail, Tails
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.system import io
from rdoq_onnx.system.encoding import Arrays, decode, encode, model_parts
from rdoq_onnx.system.progress import Advance, Progress, Unfinished
from rdoq_onnx.version import __version__

FORMAT = "rdoq-onnx curves"
VERSION = 5
_SHARE = 20  # parts of the time of which writing what is unfinished may take one
_PAUSE = 10.0  # seconds between two of these writes, at least

# What a file can hold; the names of these classes and of their fields are its format: a rename raises VERSION.
CLASSES = {
    c.__name__: c
    for c in (
        *(Activation, ActivationCandidates, Affine, Batching, Candidates, Curves, Distortions, Layer, LayerCandidates),
        *(Linear, MeasuredActivation, MeasuredLayer, Metric, Observation, Tail, Tails, Unheld, Use, WeightCodes),
    )
}

T = TypeVar("T")
Array = NDArray[Any]


@dataclass(frozen=True)
class Binding:
    """What a measurement is of: hashes of the model and the samples, and the settings that it depends on."""

    model: str
    samples: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, model: onnx.ModelProto, samples: str, settings: Mapping[str, Any]) -> "Binding":
        state = hashlib.sha256()
        for part in model_parts(model):
            state.update(hashlib.sha256(part).digest())
        return cls(state.hexdigest(), samples, json.loads(json.dumps(settings)))


class Store:
    """Values by name; in a file, too, if there is one."""

    def __init__(self, path: Path | None = None, binding: Binding | None = None) -> None:
        self._file = (path, binding) if path is not None and binding is not None else None
        self._values: dict[str, Any] = {}
        self._next = 0.0
        self._written = True

    @classmethod
    def open(cls, path: str | Path, binding: Binding) -> "Store":
        """What `path` holds, nothing if it is not there. Raises ConfigError if it is not of `binding`."""
        store = cls(Path(path), binding)
        if Path(path).exists():
            store._values = _read(Path(path), binding)
        return store

    def get(self, name: str) -> Any:
        """What was put, or None."""
        return self._values.get(name)

    def put(self, name: str, value: Any, *, finished: bool = True) -> None:
        """Keep `value`; what is not `finished` reaches the disk now and then only."""
        self._values[name], self._written = value, False
        if finished or time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write what has not reached the disk."""
        if self._file is not None and not self._written:
            begin = time.monotonic()
            _write(*self._file, self._values)
            end = time.monotonic()
            self._next, self._written = end + max(_PAUSE, _SHARE * (end - begin)), True

    def drop(self, name: str) -> None:
        """Forget all whose name begins with `name`; the file follows with the next `put`."""
        self._values = {known: value for known, value in self._values.items() if not known.startswith(name)}


@dataclass(frozen=True)
class Steps:
    """The steps of one measurement, `name`, in a store: those that it knows are not done again."""

    store: Store
    progress: Progress
    name: str

    def get(self, step: str) -> Any:
        return self.store.get(f"{self.name}/{step}")

    def put(self, step: str, value: Any, *, finished: bool = True) -> None:
        self.store.put(f"{self.name}/{step}", value, finished=finished)

    def step(self, name: str, total: int, compute: Callable[[Advance], T]) -> T:
        """What the step `name` of `total` parts computes, or what it did before."""
        found = self.get(name)
        if found is None:
            with self.progress.step(name, total) as advance:
                found = compute(advance)
            self.put(name, found)
        kept: T = found
        return kept

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What `compute` gives, or gave before; no step of its own, and on the disk after the next `flush`."""
        found = self.get(name)
        if found is None:
            found = compute()
            self.put(name, found, finished=False)
        kept: T = found
        return kept

    def unfinished(self, step: str) -> Unfinished:
        return _Kept(self, f"{step}, so far")

    def finish(self, step: str, value: Any) -> None:
        """Keep `value` alone."""
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
    header["arrays"], members = _packed(arrays)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    io.write_arrays({"header": text, **members}, path)


def _packed(arrays: Arrays) -> tuple[list[Any], dict[str, Array]]:
    """Where each array lies, (dtype, first element, shape, order), and what lies there."""
    places: list[Any] = []
    parts: dict[str, list[Array]] = {}
    ends: dict[str, int] = {}
    for array in arrays:
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        kind = array.dtype.str[1:]
        places.append((kind, ends.get(kind, 0), array.shape, order))
        parts.setdefault(kind, []).append(array.ravel(order))
        ends[kind] = ends.get(kind, 0) + array.size
    return places, {kind: np.concatenate(several) for kind, several in parts.items()}


def _unpacked(places: Sequence[Any], members: Mapping[str, Array]) -> Arrays:
    return [
        members[kind][first : first + math.prod(shape)].reshape(shape, order=order)
        for kind, first, shape, order in places
    ]


def _read(path: Path, binding: Binding) -> dict[str, Any]:
    try:
        stored = io.read_npz(path)
        header = json.loads(stored["header"].tobytes())
        if header["format"] != FORMAT:
            raise ValueError("another format")
        _check(path, header, binding)
        arrays = _unpacked(header["arrays"], stored)
        return {name: decode(tree, arrays, CLASSES) for name, tree in header["values"].items()}
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--curves {path}: cannot be read ({error.strerror or error}); give another file") from error
    except Exception as error:  # numpy, zipfile and json meet any bytes whatever
        raise ConfigError(
            f"--curves {path}: is no file of curves, or is damaged; delete it, or give another --curves file"
        ) from error


def _check(path: Path, header: Mapping[str, Any], binding: Binding) -> None:
    """Refuse a measurement of something else, and say what differs."""
    where, mend = f"--curves {path}", "give another --curves file, or delete this one"
    if header["version"] != VERSION:
        raise ConfigError(f"{where}: has format {header['version']}, this program reads {VERSION}; {mend}")
    if header["program"] != __version__:
        raise ConfigError(f"{where}: was written by rdoq-onnx {header['program']}, this is {__version__}; {mend}")
    if header["model"] != binding.model:
        raise ConfigError(f"{where}: was measured on another model; {mend}")
    for name, value in binding.settings.items():
        before = header["settings"].get(name)
        if before != value:
            option = "--" + {"exclude_ops": "exclude-op"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"{where}: was measured with {option} {_text(before)}, not {_text(value)}; {mend}")
    if header["samples"] != binding.samples:
        raise ConfigError(f"{where}: was measured on other samples (--calibration, --samples, --image-...); {mend}")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
