"""Make the files that bench_file.py compares: ours by the command line, plain int8 by ONNX Runtime's quantizer."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from judging import program
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static, shape_inference
from PIL import Image
from targets import Model
from turns import session

PEER_SAMPLES = 64
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Bench:
    """Where files go, and how they are made and timed."""

    folder: Path
    options: tuple[str, ...]
    rounds: int
    limit: int

    def make(self, model: Model, *options: str) -> Path:
        """Make a file by the command line, once. Raises FailedError."""
        return _made(self, model, (*options, *self.options))


@cache
def _made(bench: Bench, model: Model, options: tuple[str, ...]) -> Path:
    output = bench.folder / f"{model.name}_{len(list(bench.folder.iterdir()))}.onnx"
    arguments = [model.path, output, "--calibration", model.calibration, "--json", output.with_suffix(".json")]
    program(["-m", "rdoq_onnx", *arguments, "--quiet", *options])
    return output


@cache
def peer(bench: Bench, model: Model) -> Path:
    """Make plain int8 with Q/DQ pairs by onnxruntime.quantization: UINT8 activations, per-channel INT8 weights."""
    prepared, output = bench.folder / f"{model.name}_prepared.onnx", bench.folder / f"{model.name}_peer.onnx"
    logging.disable(logging.WARNING)
    shape_inference.quant_pre_process(str(model.path), str(prepared), skip_symbolic_shape=True)
    name = session(model.path).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.remaining = iter(images(model.calibration, PEER_SAMPLES))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.remaining, None)
            return None if image is None else {name: image[None]}

    quantize_static(
        str(prepared),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return output


@cache
def images(source: Path, limit: int) -> np.ndarray:
    """Load at most `limit` evenly spaced samples of a file or folder of JPEGs, float32, channels first; 0 for all."""
    if source.is_dir():
        names = sorted(source.glob("*.jpg"))
        pixels = np.stack([np.asarray(Image.open(names[k]).convert("RGB")) for k in spread(len(names), limit)])
        values = ((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    else:
        with np.load(source) as data:
            every = data["x" if "x" in data.files else data.files[0]]
            values = every[spread(len(every), limit)]
            if values.dtype == np.uint8:
                values = ((values.astype(np.float32) / 255 - data["mean"]) / data["std"]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values, np.float32)


def spread(count: int, limit: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(limit or count, count)).astype(int)
