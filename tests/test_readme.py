"""What the README shows is what happens: its commands run, its code runs, its tables name what there is."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from rdoq_onnx import cli
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, indented ones included."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    command.group(1).strip()
    for line in "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    if (command := re.search(r"(?:^|&& |bin/)rdoq-onnx (.*?)(?: \|\||&&|$)", line))
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the bundled models (few samples, so that tests are quick) to run the README in."""
    models = tmp_path / "models"
    models.mkdir()
    for model in (ROOT / "models").glob("*.onnx"):
        (models / model.name).symlink_to(model)
    with np.load(ROOT / "models" / "digits_calib.npz") as data:
        np.savez(models / "digits_calib.npz", **{**data, "x": data["x"][:24]})
    with np.load(ROOT / "models" / "plays_calib.npz") as data:
        np.savez(models / "plays_calib.npz", input_ids=data["input_ids"][:24])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_test() -> None:
    assert len(COMMANDS) >= 3
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(checkout: Path, command: str) -> None:
    arguments = shlex.split(command)
    cli.main([*arguments, "--threads", "1"])
    if "--dry-run" in arguments:
        return
    (written,) = (a for a in arguments[1:] if a.endswith(".onnx") and not a.startswith("models/"))
    emitted = list(checkout.glob(written.replace("{bits}", "*")))
    assert len(emitted) == (arguments[arguments.index("--bits") + 1].count(",") + 1 if "{bits}" in written else 1)
    for path in emitted:
        onnx.checker.check_model(path)


def test_ci_snippets_run_as_shell(checkout: Path) -> None:
    scripts = [re.findall(r"^\s+(?:- )?((?:pip|rdoq-onnx) .*)", block, re.MULTILINE) for block in blocks("yaml")]
    assert len(scripts) == 2
    assert scripts[0] == scripts[1], "one command for both"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # What it installs is there already.
    script = "\n".join(["pip() { :; }", *scripts[0]]) + " --threads 1 --quiet"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], env={**os.environ, "PATH": path}, check=False)
    assert done.returncode == 0
    assert (checkout / "cnn.onnx").stat().st_size < 200_000
    assert (checkout / "cnn.json").exists()


def test_completion_is_what_the_readme_says() -> None:
    (line,) = re.findall(r'^eval "\$\(.*\)"$', README, re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{line}; complete -p rdoq-onnx"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_rdoq_onnx_completion" in done.stdout
    asked = {"_RDOQ_ONNX_COMPLETE": "bash_complete", "COMP_WORDS": "rdoq-onnx --top1", "COMP_CWORD": "1"}
    words = subprocess.run(["rdoq-onnx"], env={**os.environ, "PATH": path, **asked}, capture_output=True, text=True)
    assert words.stdout == "plain,--top1-agreement\n"


def test_toml_blocks_are_options(checkout: Path) -> None:
    (text,) = blocks("toml")
    (checkout / "pyproject.toml").write_text(text)
    found = cli.command.make_context("rdoq-onnx", ["in.onnx", "out.onnx"]).params
    assert (found["bits"], found["min_sqnr"], found["max_bytes"]) == ("6", 5.0, "200kB")
    assert found["pin"] == ("/0/Conv=7",)


def test_python_blocks_run_one_after_the_other(checkout: Path) -> None:
    scope: dict[str, object] = {}
    for command in (c for c in COMMANDS if "digits_openvino" in c and importlib.util.find_spec("openvino")):
        cli.main([*shlex.split(command), "--threads", "1"])
    for block in blocks("python"):
        if "import openvino" in block and not importlib.util.find_spec("openvino"):
            continue
        exec(compile(block, "README.md", "exec"), scope)
    assert list(checkout.glob("*.onnx"))


def test_table_of_options_is_the_list_of_options() -> None:
    told = re.findall(r"^\| `(--[a-z0-9-]+)", README, re.MULTILINE)
    assert sorted(told) == sorted(o for p in cli.command.params for o in p.opts if o.startswith("--"))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
