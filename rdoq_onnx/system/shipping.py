"""Send models to other processes of a Ray cluster, each file of weights once to a node.

A node that reads the same file as the run takes that; any other gets a copy of the bytes from the object store.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rdoq_onnx.model.external import Place, bytes_at, place

RUN = secrets.token_hex(8)  # names the copies of weights that this run makes on other nodes


@dataclass(frozen=True)
class Weights:
    """Weights of a model in a file: where they are on the machine of the run, and their bytes in the object store."""

    where: Place
    mark: tuple[int, ...]
    bytes: Any
    run: str

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


def travel(ray: Any) -> None:
    """Let models travel with the weights that they have in files."""
    known: dict[Place, Weights] = {}

    def packed(model: onnx.ModelProto) -> tuple[bytes, list[tuple[int, Weights]]]:
        weights = []
        for k, tensor in enumerate(model.graph.initializer):
            where = Place.of(tensor)
            if where is not None:
                if where not in known:
                    known[where] = Weights(where, _mark(where.path), ray.put(bytes_at(where)), RUN)
                weights.append((k, known[where]))
        return model.SerializeToString(), weights

    ray.util.register_serializer(onnx.ModelProto, serializer=packed, deserializer=_unpacked)


def _unpacked(packed: tuple[bytes, list[tuple[int, Weights]]]) -> onnx.ModelProto:
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


def remove_copies(run: str) -> None:
    """Remove the copies of weights that a run made on this node."""
    shutil.rmtree(_copies(run), ignore_errors=True)
