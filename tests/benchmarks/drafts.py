"""A graph whose tensors are recipes, and its file, written tensor by tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from random_weights import Floats, Matrix, Stored, gains, offsets

OPSET, IR = 17, 8
PAGE = 4096  # bytes: tensors in the data file start at multiples
INLINE = 1024  # bytes: smaller tensors stay in the model file
LIMIT = 2**31 - 2**24  # bytes of tensors in one file
GRAPH, INITIALIZER, RAW = b"\x3a", b"\x2a", b"\x4a"  # protobuf tags: graph of a model, initializer, raw_data


@dataclass
class Draft:
    """Nodes and tensors, in the order in which they are added."""

    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[Stored | Matrix] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def node(self, op: str, path: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add the node `path` and return its output, named after it unless `output` is given."""
        name = output or f"{path}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [name], path, **attributes))
        return name

    def constant(self, path: str, value: float | Sequence[int], kind: type = np.float32) -> str:
        """Add a Constant node: a float by default, a list as int64."""
        array: NDArray[Any] = np.array(value, np.int64 if isinstance(value, Sequence) else kind)
        path = f"{path}/Constant_{len(self.nodes)}"
        return self.node("Constant", path, value=numpy_helper.from_array(array))

    def binary(self, op: str, path: str, first: str, value: float) -> str:
        """Add an operator on a tensor and a float constant."""
        return self.node(op, path, first, self.constant(path.rpartition("/")[0], value))

    def input(self, name: str, kind: int, *shape: str | int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, *shape: str | int) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))

    def stored(self, name: str, values: NDArray[Any]) -> str:
        self.tensors.append(Stored(name, values))
        return name

    def gains(self, name: str, width: int, power: int = 1) -> Floats:
        """Add the gains of a norm and return their values."""
        self.stored(name, values := gains(name, width, self.seed, power))
        return values

    def offsets(self, name: str, width: int) -> str:
        return self.stored(name, offsets(name, width, self.seed))

    def matrix(self, name: str, shape: tuple[int, int], deviation: float, behind: Floats | None = None) -> str:
        """Add a random matrix; `behind` are the gains of the norm in front of it."""
        self.tensors.append(Matrix(name, shape, deviation, self.seed, behind))
        return name

    def write(self, path: Path, inline: bool = False) -> None:
        """Write the model to `path`, its tensors to `<name>_data` next to it or, if `inline`, into the same file."""
        total = sum(map(_bytes, self.tensors))
        if inline and total > LIMIT:
            raise SystemExit(f"{path}: {total / 2**30:.1f} GiB of tensors do not fit into one file; drop --inline")
        graph = onnx.GraphProto(name="main_graph", node=self.nodes)
        ends = onnx.GraphProto(input=self.inputs, output=self.outputs)
        with path.open("wb") as file:
            if inline:
                _write_inline(file, graph, ends, self.tensors)
                return
            with path.with_name(f"{path.name}_data").open("wb") as data:
                graph.initializer.extend(_externals(self.tensors, data))
            graph.MergeFrom(ends)
            model = onnx.ModelProto(ir_version=IR, producer_name="networks", graph=graph)
            model.opset_import.add(version=OPSET)
            file.write(model.SerializeToString(deterministic=True))


def _externals(tensors: Sequence[Stored | Matrix], data: BinaryIO) -> Iterator[onnx.TensorProto]:
    """Write each large tensor to `data` and yield its entry in the model file."""
    for tensor in tensors:
        entry = _entry(tensor)
        if _bytes(tensor) < INLINE:
            entry.raw_data = b"".join(_chunks(tensor))
        else:
            data.seek(-data.tell() % PAGE, 1)
            where = {"location": Path(data.name).name, "offset": data.tell(), "length": _bytes(tensor)}
            entry.data_location = onnx.TensorProto.EXTERNAL
            for key, value in where.items():
                entry.external_data.add(key=key, value=str(value))
            data.writelines(_chunks(tensor))
        yield entry


def _write_inline(
    file: BinaryIO, graph: onnx.GraphProto, ends: onnx.GraphProto, tensors: Sequence[Stored | Matrix]
) -> None:
    """Write the bytes that protobuf would, without ever holding the model: fields in order, lengths beforehand."""
    heads = []
    for tensor in tensors:
        head = _entry(tensor).SerializeToString(deterministic=True) + RAW + _varint(_bytes(tensor))
        heads.append(INITIALIZER + _varint(len(head) + _bytes(tensor)) + head)
    first, last = graph.SerializeToString(deterministic=True), ends.SerializeToString(deterministic=True)
    size = len(first) + sum(map(len, heads)) + sum(map(_bytes, tensors)) + len(last)
    file.write(onnx.ModelProto(ir_version=IR, producer_name="networks").SerializeToString())
    file.write(GRAPH + _varint(size) + first)
    for head, tensor in zip(heads, tensors, strict=True):
        file.write(head)
        file.writelines(_chunks(tensor))
    file.write(last)
    opset = onnx.OperatorSetIdProto(version=OPSET)
    file.write(onnx.ModelProto(opset_import=[opset]).SerializeToString())


def _entry(tensor: Stored | Matrix) -> onnx.TensorProto:
    integer = isinstance(tensor, Stored) and tensor.values.dtype == np.int64
    kind = onnx.TensorProto.INT64 if integer else onnx.TensorProto.FLOAT
    return onnx.TensorProto(dims=tensor.shape, data_type=kind, name=tensor.name)


def _chunks(tensor: Stored | Matrix) -> Iterator[bytes]:
    return (block.tobytes() for block in tensor.blocks())


def _bytes(tensor: Stored | Matrix) -> int:
    return tensor.values.nbytes if isinstance(tensor, Stored) else 4 * tensor.shape[0] * tensor.shape[1]


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(128 | value & 127)
        value >>= 7
    return bytes([*digits, value])
