"""The pass of Olive, run by Olive. It needs olive-ai, which wants PyTorch: see docs/guide/olive.md."""

import json

import onnx
import pytest

from tests.conftest import ROOT

pytest.importorskip("olive", reason="olive-ai is not installed")

MODEL, SAMPLES = (str(ROOT / "models" / name) for name in ("digits_cnn.onnx", "digits_calib.npz"))


def test_a_workflow_quantizes(tmp_path):
    from olive import run

    from rdoq_onnx.integrations.olive import package_config

    package = tmp_path / "package.json"
    package_config(package)
    assert json.loads(package.read_text())["passes"]["RdoqOnnx"]["module_path"].endswith("olive.RdoqOnnx")
    workflow = {
        "input_model": {"type": "OnnxModel", "model_path": MODEL},
        "passes": {
            "quantize": {
                "type": "RdoqOnnx",
                "weight_bits": 4,
                "activation_bits": "8",
                "calibration": SAMPLES,
                "options": {"effort": "fast", "samples": 24, "threads": 1},
            }
        },
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }
    run(workflow, package_config=str(package))
    (path,) = (tmp_path / "out").rglob("*.onnx")
    onnx.checker.check_model(str(path))
    assert path.stat().st_size < 80_000
