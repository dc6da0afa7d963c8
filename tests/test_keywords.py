"""Keyword arguments of the Python API."""

import subprocess
import sys
from dataclasses import fields

import pytest

from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.keywords import Options, keywords
from tests.conftest import ROOT

OWN = {"weight_bits", "activation_bits", "moved"}  # arguments of `quantize`, and what the command line derives


def test_each_setting_has_a_type():
    assert set(Options.__annotations__) == {f.name for f in fields(Config)} - OWN


def test_text_is_taken_as_on_the_command_line():
    found = keywords({"size": "30kB", "widths": "2-4", "pins": {"a.*": 8}, "image_mean": "0.5", "seed": 3})
    assert found == {"size": 30000, "widths": (2, 3, 4), "pins": (("a.*", 8),), "image_mean": (0.5,), "seed": 3}


@pytest.mark.parametrize("name", ["efort", "transfrm"])
def test_an_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ConfigError, match=r"nearest is (effort|transform)"):
        keywords({name: 1}, ("transform",))


@pytest.mark.parametrize(("text", "right"), [("effort='fast'", True), ("efort='fast'", False), ("effort=3", False)])
def test_mypy_finds_a_misspelt_option(text, right):
    code = f"import rdoq_onnx\nrdoq_onnx.quantize('m.onnx', 'c.npz', bits=4, {text})\n"
    options = ["--config-file=", "--follow-imports=silent", "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode == 0) == right, done.stdout
