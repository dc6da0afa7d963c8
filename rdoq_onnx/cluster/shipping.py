"""Send what a sum needs to other processes of a Ray cluster, each file of weights once to a node.

A parcel is a pickle, its arrays apart, and the places of the weights that its models have in files. A node that reads
the same file as the run takes that; any other gets a copy of the bytes from the object store.
"""

import contextlib
import io
import os
import pickle  # noqa: TID251 - between processes of one run, as Ray does; no file is read
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.model.external import Place, bytes_at, place

RUN = secrets.token_hex(8)  # names the copies of weights that this run makes on other nodes


@dataclass(frozen=True)
class Weights:
    """Weights in a file: where they are on the machine of the run, what tells that file, and a reference to them."""

    where: Place
    mark: tuple[int, ...]
    reference: Any
    run: str = RUN

    def at(self, get: Any) -> Place:
        """Return where the weights are on the machine of this process; `get` reads a reference."""
        with contextlib.suppress(OSError):
            if _mark(self.where.path) == self.mark:
                return self.where
        path = _copies(self.run) / f"{self.reference.hex()}.weights"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(np.asarray(get(self.reference)).data)
            part.replace(path)
        return Place(os.fspath(path), 0, self.where.length)


Parcel = tuple[Any, list[Weights]]  # a reference, and the weights that it needs


@dataclass
class Sender:
    """Packs parcels for `ray`; weights are put into its object store once.

    last: what was shared last, with its parcels.
    """

    ray: Any
    known: dict[Place, Weights] = field(default_factory=dict)
    last: tuple[Sequence[Any], list[Parcel]] = ((), [])

    def shared(self, values: Sequence[Any]) -> list[Parcel]:
        """Return the `packed` parcels of `values`; those of the call before if they are the same objects."""
        before, parcels = self.last
        if len(before) != len(values) or any(a is not b for a, b in zip(before, values, strict=True)):
            parcels = [self.packed(value) for value in values]
            self.last = values, parcels
        return parcels

    def packed(self, value: Any) -> Parcel:
        """Return a reference to the parcel of `value`, and the weights that it needs."""
        places: dict[Place, None] = {}
        file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()

        class Pickler(self.ray.cloudpickle.CloudPickler):  # type: ignore[name-defined,misc]
            def reducer_override(self, obj: Any) -> Any:
                if not isinstance(obj, onnx.ModelProto):
                    return super().reducer_override(obj)
                own = [(k, where) for k, t in enumerate(obj.graph.initializer) if (where := Place.of(t))]
                places.update(dict.fromkeys(where for _, where in own))
                return _arrived, (obj.SerializeToString(), own)

        Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
        arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        parcel = self.ray.put([np.frombuffer(file.getbuffer(), np.uint8), *arrays])
        return parcel, [self._weights(where) for where in places]

    def _weights(self, where: Place) -> Weights:
        if where not in self.known:
            self.known[where] = Weights(where, _mark(where.path), self.ray.put(bytes_at(where)))
        return self.known[where]


_arriving: Mapping[Place, Place] = {}  # of the parcel that this process unpacks


def unpacked(parcel: Sequence[NDArray[np.uint8]], weights: Sequence[Weights], get: Any) -> Any:
    """Return what a parcel holds, with its weights where they are on this machine; get: as in `Weights.at`."""
    global _arriving
    _arriving = {each.where: each.at(get) for each in weights}
    return pickle.loads(parcel[0].data, buffers=[array.data for array in parcel[1:]])  # noqa: S301 - see above


def _arrived(data: bytes, own: Sequence[tuple[int, Place]]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.ParseFromString(data)
    for k, where in own:
        place(model.graph.initializer[k], _arriving[where])
    return model


def _mark(path: str) -> tuple[int, ...]:
    """Return what two machines that share a file agree on, and what no two files have in common."""
    found = Path(path).stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _copies(run: str) -> Path:
    return Path(tempfile.gettempdir(), f"rdoq-onnx-{run}")


def remove_copies(run: str) -> None:
    """Remove the copies of weights that a run made on this node."""
    shutil.rmtree(_copies(run), ignore_errors=True)
