"""Where people already work: the GitHub Action, the Docker image, a model folder as optimum-cli exports it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from tests.conftest import ROOT
from tests.test_readme import checkout  # noqa: F401

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def run_action(folder, **inputs):
    """Run the step that quantizes as GitHub does, in an environment that has the package."""
    step = next(s for s in ACTION["runs"]["steps"] if s.get("id") == "quantize")
    values = {name: given.get("default", "") for name, given in ACTION["inputs"].items()} | inputs
    environment = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], text)
        for name, text in step["env"].items()
    }
    programs = folder / "runner" / "rdoq-onnx" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name in ("python", "rdoq-onnx"):
        target = programs / name
        target.unlink(missing_ok=True)
        target.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
        target.chmod(0o755)
    outputs = folder / "outputs"
    outputs.write_text("")
    environment |= {"RUNNER_TEMP": str(folder / "runner"), "GITHUB_OUTPUT": str(outputs)}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done, dict(line.split("=", 1) for line in outputs.read_text().splitlines())


OPTIONS = {
    "model": "models/digits_cnn.onnx",
    "output": "out.onnx",
    "calibration": "models/digits_calib.npz",
    "arguments": "--weight-bits 4 --activation-bits 8 --effort fast --threads 1 --pin '/0/Conv=7'",
}


def test_action_quantizes_and_gives_figures(checkout: Path) -> None:  # noqa: F811
    done, outputs = run_action(checkout, **OPTIONS)
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(checkout / "out.onnx")
    assert outputs.keys() == ACTION["outputs"].keys()
    assert float(outputs["sqnr"]) > 20
    assert int(outputs["bytes"]) == (checkout / "out.onnx").stat().st_size
    layers = json.loads(Path(outputs["report"]).read_text())["layers"]
    assert set(layers[0]["bits"]) == {7}


def test_action_fails_at_a_gate(checkout: Path) -> None:  # noqa: F811
    done, outputs = run_action(checkout, **OPTIONS, **{"min-sqnr": "90"})
    assert done.returncode == 4
    assert "90" in done.stderr
    assert float(outputs["sqnr"]) < 90
    assert not (checkout / "out.onnx").exists()


def test_the_image_is_made_of_what_is_there() -> None:
    copied = [path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]
    assert copied
    assert all((ROOT / path).exists() for path in copied)
    extras = set(re.search(r"/src\[([\w,]+)\]", DOCKERFILE)[1].split(","))
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert extras <= declared


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as `optimum-cli export onnx` writes it: the model among configuration and tokenizer files."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((ROOT / "models" / "plays_decoder.onnx").read_bytes())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


def test_an_exported_folder_keeps_its_names(exported: Path) -> None:
    with np.load(ROOT / "models" / "plays_calib.npz") as data:
        np.savez(exported / "calib.npz", input_ids=data["input_ids"][:12])
    command = ["model.onnx", "model_quantized.onnx", "--weight-bits", "4", "--activation-bits", "none"]
    options = ["--calibration", "calib.npz", "--effort", "fast", "--threads", "1", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "rdoq_onnx", *command, *options], cwd=exported, capture_output=True)
    assert done.returncode == 0, done.stderr
    before, after = (onnx.load(exported / name).graph for name in ("model.onnx", "model_quantized.onnx"))
    for side in ("input", "output"):
        assert [v.name for v in getattr(after, side)] == [v.name for v in getattr(before, side)]
