"""Compare with onnxruntime.quantization, each tool by its recommended call, with the same judge.

    python tests/benchmarks/bench_peers.py [--model PATH]

On the models of models/: plain int8 and int4 weights by quantize_static (Q/DQ pairs, per channel, min-max ranges, after
its pre-processing), and this project's command line at its defaults. All calibrate on the same samples.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from judging import FailedError, judge, program
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static, shape_inference
from tables import write
from targets import ROOT, Model
from turns import session

SIZES = (-12, -26, -8, 8, 8, 10, 9, 8)
OWN = {"W8A8": ["--bits", "8"], "W4A8": ["--weight-bits", "4", "--activation-bits", "8"], "W4A4": ["--bits", "4"]}
PEER = {"W8A8": QuantType.QInt8, "W4A8": QuantType.QInt4}


def own(model: Model, setting: str, output: Path) -> None:
    arguments = [model.path, output, "--calibration", model.calibration, "--json", output.with_suffix(".json")]
    program(["-m", "rdoq_onnx", *arguments, "--quiet", *OWN[setting]])


def peer(model: Model, setting: str, output: Path) -> None:
    prepared = output.with_suffix(".prepared.onnx")
    logging.disable(logging.WARNING)
    shape_inference.quant_pre_process(str(model.path), str(prepared), skip_symbolic_shape=True)
    name = session(model.path).get_inputs()[0].name
    samples = iter(images(model.calibration))

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(samples, None)
            return None if image is None else {name: image[None]}

    quantize_static(
        str(prepared),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=PEER[setting],
    )
    bits = {"weights": float(setting[1]), "activations": 8.0}
    output.with_suffix(".json").write_text(json.dumps({"bits": bits}))


def images(path: Path) -> np.ndarray:
    """Load samples in the form of the models' input, [N, 1, 28, 28] float32."""
    with np.load(path) as data:
        scaled = (data["x"].astype(np.float32) / 255 - data["mean"]) / data["std"]
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


TOOLS: dict[str, tuple[Callable[[Model, str, Path], None], list[str]]] = {
    "onnxruntime.quantization": (peer, list(PEER)),
    "rdoq-onnx": (own, list(OWN)),
}


def rows(model: Model, folder: Path) -> Iterator[tuple[str, ...]]:
    for tool, (make, settings) in TOOLS.items():
        for setting in settings:
            output, begin = folder / f"{tool}_{setting}.onnx", time.perf_counter()
            try:
                make(model, setting, output)
                seconds = time.perf_counter() - begin
                figures = judge(output, output.with_suffix(".json"), model, 0)
            except FailedError as error:
                yield model.name, tool, setting, str(error)
                continue
            yield (
                model.name,
                tool,
                setting,
                f"{figures['sqnr_db']:.1f}",
                f"{figures['top1']['quantized']:.1f}",
                f"{figures['agreement']:.1f}",
                f"{figures['bytes']['quantized'] / 1000:.0f}",
                f"{seconds:.0f}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another model; the samples are those of models/")
    chosen = parser.parse_args().model
    paths = [chosen] if chosen else [ROOT / "models" / f"{name}.onnx" for name in ("digits_cnn", "digits_vit")]
    data = ROOT / "models"
    write(("model", "tool", "setting", "SQNR dB", "top-1", "agreement", "kB", "seconds"), SIZES)
    for path in paths:
        model = Model(path.stem, path, data / "digits_calib.npz", data / "digits_test.npz", ())
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(model, Path(folder)):
                write(row, SIZES[: len(row)])


if __name__ == "__main__":
    main()
