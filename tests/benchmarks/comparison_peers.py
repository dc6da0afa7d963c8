"""Quantize a model with another tool by its recommended call; bench_comparisons.py runs this in the tool's environment.

    PYTHON comparison_peers.py TOOL MODEL CALIBRATION.npz SETTING OUTPUT
    PYTHON comparison_peers.py TOOL --version

TOOL: onnxruntime, nncf or aimet. CALIBRATION holds an array for each input, samples on axis 0. SETTING: W8A8,
W4A8 or W4A4. A setting that the tool does not have ends with exit code 3.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

PACKAGES = {"onnxruntime": "onnxruntime", "nncf": "nncf", "aimet": "aimet-onnx"}


class LacksError(Exception):
    """The tool does not have the setting."""


def feeds(calibration: str) -> Iterator[dict[str, np.ndarray]]:
    with np.load(calibration) as data:
        arrays = dict(data)
    for row in range(len(next(iter(arrays.values())))):
        yield {name: values[row : row + 1] for name, values in arrays.items()}


def by_onnxruntime(model: str, calibration: str, setting: str, output: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static, shape_inference

    kinds = {"W8A8": QuantType.QInt8, "W4A8": QuantType.QInt4}
    if setting not in kinds:
        raise LacksError
    samples = feeds(calibration)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(samples, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder, "prepared.onnx"))
        shape_inference.quant_pre_process(model, prepared, skip_symbolic_shape=True)
        options = {"quant_format": QuantFormat.QDQ, "per_channel": True}
        types = {"activation_type": QuantType.QUInt8, "weight_type": kinds[setting]}
        quantize_static(prepared, output, Reader(), **options, **types)


def by_nncf(model: str, calibration: str, setting: str, output: str) -> None:
    import nncf
    import onnx

    if setting != "W8A8":
        raise LacksError
    loaded = onnx.load(model)
    transformer = any(node.op_type in ("LayerNormalization", "Erf") for node in loaded.graph.node)
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    samples = list(feeds(calibration))
    dataset = nncf.Dataset(samples)
    onnx.save(nncf.quantize(loaded, dataset, model_type=kind, subset_size=len(samples)), output)


def by_aimet(model: str, calibration: str, setting: str, output: str) -> None:
    import aimet_onnx
    import onnx
    from aimet_onnx import QuantizationSimModel

    weights, activations = setting[1:].split("A")
    loaded = onnx.load(model)
    sim = QuantizationSimModel(
        loaded,
        param_type=getattr(aimet_onnx, f"int{weights}"),
        activation_type=getattr(aimet_onnx, f"int{activations}"),
    )
    sim.compute_encodings(list(feeds(calibration)))
    onnx.save(sim.to_onnx_qdq(), output)


TOOLS = {"onnxruntime": by_onnxruntime, "nncf": by_nncf, "aimet": by_aimet}


def main() -> None:
    tool, *rest = sys.argv[1:]
    if rest == ["--version"]:
        sys.stdout.write(version(PACKAGES[tool]))
        return
    model, calibration, setting, output = rest
    logging.disable(logging.WARNING)
    try:
        TOOLS[tool](model, calibration, setting, output)
    except LacksError:
        sys.exit(3)


if __name__ == "__main__":
    main()
