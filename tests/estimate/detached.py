"""A model whose weights are detached, and zeros in a sparse file: nothing that is read of them is of any use."""

import os
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, parser

WIDTH, INNER = 512, 8192  # as many weights as take DETACHED bytes
TEXT = """<ir_version: 8, opset_import: ["": 17]>
detached (float[N, 512] x) => (float[N, 512] y) {
  a = MatMul(x, w)
  b = Relu(a)
  y = MatMul(b, v)
}"""


def write_detached(folder: Path) -> Path:
    """Write the model, its sparse data, and calib.npz with 40 samples to `folder`; return the model's path."""
    model = parser.parse_model(TEXT)
    shapes = {"w": (WIDTH, INNER), "v": (INNER, WIDTH)}
    offset = 0
    for name, shape in shapes.items():
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        length = 4 * shape[0] * shape[1]
        for key, value in (("location", "data"), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
        offset += length
    onnx.save(model, folder / "model.onnx")
    (folder / "data").touch()
    os.truncate(folder / "data", offset)
    rng = np.random.default_rng(0)
    np.savez(folder / "calib.npz", x=rng.standard_normal((40, WIDTH), np.float32))
    return folder / "model.onnx"
