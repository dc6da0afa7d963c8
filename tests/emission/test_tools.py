"""What people do with files: tools that convert and simplify them leave a file that loads and computes the same."""

import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from rdoq_onnx.emission.emit import METADATA
from rdoq_onnx.model.protos import all_names
from tests.conftest import ROOT, OrtRun
from tests.emission.test_storage_runtimes import MODELS, agree, emitted, feeds_of

STORAGES = ("packed", "native", "int8")
COUNT = 50


@pytest.mark.parametrize("style", ["Runtime", "Fixed"])
@pytest.mark.parametrize("storage", STORAGES)
def test_converted_to_the_format_of_onnxruntime(ort_run: OrtRun, tmp_path: Path, storage: str, style: str) -> None:
    """The script stores fusions around DequantizeLinear, which it cannot where one has no zero point."""
    model = emitted("digits_cnn", "onnxruntime", storage, False)
    onnx.save(model, tmp_path / "model.onnx")
    script = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", tmp_path / "model.onnx"]
    done = subprocess.run([*script, "--optimization_style", style], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    feeds = feeds_of(model, COUNT)
    files = list(tmp_path.glob("*.ort"))
    assert files
    for file in files:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        agree(session.run(None, feeds)[0], ort_run(model, feeds, "none")[0], file.name)


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    result, ok = pytest.importorskip("onnxsim").simplify(model)
    assert ok
    return result


def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    return pytest.importorskip("onnxslim").slim(model)


def optimized_as_transformer(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    return optimize_by_fusion(model, "vit").model


@pytest.mark.filterwarnings("ignore")  # of the tools
@pytest.mark.parametrize("tool", [simplified, slimmed, optimized_as_transformer])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_simplified(ort_run: OrtRun, name: str, storage: str, tool) -> None:  # type: ignore[no-untyped-def]
    model = emitted(name, "onnxruntime", storage, False)
    feeds = feeds_of(model, COUNT)
    copy = onnx.ModelProto()  # tools alter what they are given
    copy.CopyFrom(model)
    result = tool(copy)
    for level in ("none", "all"):
        agree(ort_run(result, feeds, level)[0], ort_run(model, feeds, "none")[0], level)


@pytest.mark.parametrize("storage", STORAGES)
def test_names(storage: str) -> None:
    model = emitted("digits_cnn", "onnxruntime", storage, False)
    original = onnx.load(ROOT / "models" / "digits_cnn.onnx")
    assert (model.producer_name, model.producer_version) == ("rdoq-onnx", onnx_version(model))
    made = {o: n for n in model.graph.node for o in n.output}
    layers = [n for n in original.graph.node if n.op_type in ("Conv", "Gemm")]
    for layer in layers:
        assert made[layer.input[1]].op_type == "DequantizeLinear", "a weight is decoded under its name"
        assert {layer.name, layer.output[0]} < set(all_names(model.graph))
    assert ("packed_*" in model.graph.doc_string) == (storage != "int8")
    packed = {t.name for t in model.graph.initializer if t.name.startswith("packed_")}
    assert {"packed_scales", "packed_biases"} <= packed or storage == "int8"
    assert ("packed_bits" in packed) == (storage == "packed")


def onnx_version(model: onnx.ModelProto) -> str:
    return next(p.value for p in model.metadata_props if p.key == f"{METADATA}.version")


def test_every_decoder_has_a_zero_point() -> None:
    for name in MODELS:
        for storage in STORAGES:
            model = emitted(name, "onnxruntime", storage, False)
            assert all(len(n.input) == 3 for n in model.graph.node if n.op_type == "DequantizeLinear")
