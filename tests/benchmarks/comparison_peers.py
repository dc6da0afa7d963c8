"""Quantize a model with another tool by its recommended call; bench_comparisons.py runs this in the tool's environment.

    PYTHON comparison_peers.py TOOL MODEL CALIBRATION.npz SETTING OUTPUT
    PYTHON comparison_peers.py TOOL --version

TOOL is a key of TOOLS; what follows a plus sign is a technique of the same package. CALIBRATION holds an array for each
input, samples on axis 0. SETTING: W8A8, W4A8, W4A4, or W4 for weights alone. A setting that the tool does not have ends
with exit code 3.

Environments: `pip install PACKAGE` brings PyTorch with CUDA for aimet, quark and modelopt. On a CPU install a build of
torch for it first, then the package with --no-deps, then the rest of what it requires. aimet also needs onnxsim, which
its documentation recommends in front.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

PACKAGES = {
    "onnxruntime": "onnxruntime",
    "nncf": "nncf",
    "aimet": "aimet-onnx",
    "modelopt": "nvidia-modelopt",
    "quark": "amd-quark",
    "onnxsim": "onnxsim",
    "inc": "onnx-neural-compressor",
    "olive": "olive-ai",
}
LACKS = 3
ADAROUND_STEPS = 500  # AIMET recommends 15,000, which take hours on a CPU
INT4_OPSET = 21


class LacksError(Exception):
    """The tool does not have the setting."""


def feeds(calibration: str) -> Iterator[dict[str, np.ndarray]]:
    with np.load(calibration) as data:
        arrays = dict(data)
    for row in range(len(next(iter(arrays.values())))):
        yield {name: values[row : row + 1] for name, values in arrays.items()}


class Reader:
    """The samples one at a time, as ONNX Runtime's quantizer and those built on it read them."""

    def __init__(self, calibration: str) -> None:
        self.samples = list(feeds(calibration))
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.remaining, None)

    def rewind(self) -> None:
        self.remaining = iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def by_onnxruntime(model: str, calibration: str, setting: str, output: str) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static, shape_inference

    kinds = {"W8A8": QuantType.QInt8, "W4A8": QuantType.QInt4}
    if setting not in kinds:
        raise LacksError
    with tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder, "prepared.onnx"))
        shape_inference.quant_pre_process(model, prepared, skip_symbolic_shape=True)
        options = {"quant_format": QuantFormat.QDQ, "per_channel": True}
        types = {"activation_type": QuantType.QUInt8, "weight_type": kinds[setting]}
        quantize_static(prepared, output, Reader(calibration), **options, **types)


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


def by_aimet(model: str, calibration: str, setting: str, output: str, optimize: str | None = None) -> None:
    import aimet_onnx
    import onnx
    import onnxsim
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight

    if setting == "W4":
        raise LacksError
    weights, activations = setting[1:].split("A")
    loaded, samples = onnxsim.simplify(onnx.load(model))[0], list(feeds(calibration))
    fold_all_batch_norms_to_weight(loaded)
    sim = aimet_onnx.QuantizationSimModel(
        loaded,
        param_type=getattr(aimet_onnx, f"int{weights}"),
        activation_type=getattr(aimet_onnx, f"int{activations}"),
    )
    if optimize == "seqmse":
        aimet_onnx.apply_seq_mse(sim, samples)
    elif optimize == "adaround":
        aimet_onnx.apply_adaround(sim, samples, ADAROUND_STEPS)
    sim.compute_encodings(samples)
    onnx.save(sim.to_onnx_qdq(prequantize_constants=True), output)


def by_modelopt(model: str, calibration: str, setting: str, output: str) -> None:
    from modelopt.onnx.quantization import quantize

    if setting != "W8A8":
        raise LacksError
    with np.load(calibration) as data:
        arrays = dict(data)
    quantize(
        model,
        quantize_mode="int8",
        calibration_data=arrays,
        calibration_eps=["cpu"],
        output_path=output,
        high_precision_dtype="fp32",
    )


def by_quark(model: str, calibration: str, setting: str, output: str) -> None:
    import onnx
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config import Config, get_default_config

    if setting != "W8A8":
        raise LacksError
    transformer = any(node.op_type in ("LayerNormalization", "Erf") for node in onnx.load(model).graph.node)
    config = get_default_config(f"INT8_{'TRANSFORMER' if transformer else 'CNN'}_DEFAULT")
    ModelQuantizer(Config(global_quant_config=config)).quantize_model(model, output, Reader(calibration))


def by_onnxsim(model: str, calibration: str, setting: str, output: str) -> None:
    import onnx
    import onnxsim

    simple, _ = onnxsim.simplify(onnx.load(model))
    if setting == "W8A8":
        quantized = onnxsim.quantize_static(simple, calibration_data=list(feeds(calibration)))
    elif setting == "W4":
        quantized = onnxsim.quantize_weight_only_int4(onnx.version_converter.convert_version(simple, INT4_OPSET))
    else:
        raise LacksError
    onnx.save(onnxsim.simplify(quantized)[0], output)  # without it the float weights stay in the file


def by_inc(model: str, calibration: str, setting: str, output: str) -> None:
    from onnx_neural_compressor.quantization import config, quantize

    if setting != "W8A8":
        raise LacksError
    quantize(model, output, config.StaticQuantConfig(calibration_data_reader=Reader(calibration)))


def by_olive(model: str, calibration: str, setting: str, output: str) -> None:
    import onnx
    from olive import run
    from olive.data.registry import Registry
    from torch.utils.data import Dataset

    if setting != "W8A8":
        raise LacksError

    @Registry.register_dataset()
    class ComparisonSamples(Dataset):
        def __init__(self, **_: object) -> None:
            with np.load(calibration) as data:
                self.arrays = dict(data)

        def __len__(self) -> int:
            return len(next(iter(self.arrays.values())))

        def __getitem__(self, row: int) -> tuple[dict[str, np.ndarray], int]:
            return {name: values[row] for name, values in self.arrays.items()}, 0

    samples = {
        "name": "samples",
        "load_dataset_config": {"type": "ComparisonSamples"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"params": {"batch_size": 1}},
    }
    with tempfile.TemporaryDirectory() as folder:
        workflow = {
            "input_model": {"type": "OnnxModel", "model_path": model},
            "passes": {"quantize": {"type": "OnnxStaticQuantization", "data_config": samples}},
            "output_dir": str(Path(folder, "out")),
            "cache_dir": str(Path(folder, "cache")),
        }
        run(workflow)
        (path,) = Path(folder, "out").rglob("*.onnx")
        onnx.save(onnx.load(path), output)


TOOLS = {
    "onnxruntime": by_onnxruntime,
    "nncf": by_nncf,
    "aimet": by_aimet,
    "aimet+seqmse": partial(by_aimet, optimize="seqmse"),
    "aimet+adaround": partial(by_aimet, optimize="adaround"),
    "modelopt": by_modelopt,
    "quark": by_quark,
    "onnxsim": by_onnxsim,
    "inc": by_inc,
    "olive": by_olive,
}


def main() -> None:
    tool, *rest = sys.argv[1:]
    if rest == ["--version"]:
        sys.stdout.write(version(PACKAGES[tool.split("+")[0]]))
        return
    model, calibration, setting, output = rest
    logging.disable(logging.WARNING)
    try:
        TOOLS[tool](model, calibration, setting, output)
    except LacksError:
        sys.exit(LACKS)


if __name__ == "__main__":
    main()
