"""What README and docs show is what happens: their commands run, their code runs, their tables name what there is."""

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
from PIL import Image

from rdoq_onnx import cli
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
SELF_TESTED = {DOCS / "hardware-cost.md"}  # tests/test_hardware_cost.py runs it from top to bottom


def blocks(language: str, page: Path | None = None) -> list[str]:
    """The fenced blocks of a language in one page, or all."""
    texts = [text for path, text in PAGES.items() if page in (None, path) and path not in SELF_TESTED]
    return [
        found for text in texts for found in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


COMMANDS = list(
    dict.fromkeys(
        command.group(1).strip()
        for line in "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
        if (command := re.search(r"(?:^|&& |bin/)rdoq-onnx (.*?)(?: \|\||&&|$)", line))
    )
)
PYTHON = [path for path in PAGES if path not in SELF_TESTED and blocks("python", path)]


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
    (models / "digits_test.npz").symlink_to(ROOT / "models" / "digits_test.npz")
    (tmp_path / "yours.onnx").symlink_to(ROOT / "models" / "digits_cnn.onnx")
    (tmp_path / "photos").mkdir()
    with np.load(models / "digits_calib.npz") as data:
        for k, image in enumerate(data["x"]):
            Image.fromarray(image[..., 0]).save(tmp_path / "photos" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_test() -> None:
    assert len(COMMANDS) >= 3
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(checkout: Path, command: str) -> None:
    arguments = shlex.split(command)
    quick = [] if "--effort" in arguments or "--dry-run" in arguments else ["--effort", "fast"]
    cli.main([*arguments, *quick, "--threads", "1"])
    if "--dry-run" in arguments:
        return
    (written,) = (a for a in arguments[1:] if a.endswith(".onnx") and not a.startswith("models/"))
    emitted = list(checkout.glob(written.replace("{bits}", "*")))
    assert len(emitted) == (arguments[arguments.index("--bits") + 1].count(",") + 1 if "{bits}" in written else 1)
    for path in emitted:
        onnx.checker.check_model(path)


def test_ci_snippets_run_as_shell(checkout: Path) -> None:
    scripts = [re.findall(r"^\s+(?:- )?((?:pip|rdoq-onnx) .*)", block, re.MULTILINE) for block in blocks("yaml")]
    scripts = [script for script in scripts if script]
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
    (line,) = re.findall(r'^eval "\$\(.*\)"$', PAGES[DOCS / "reference" / "options.md"], re.MULTILINE)
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


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_python_blocks_run_one_after_the_other(checkout: Path, page: Path) -> None:
    for line in blocks("sh", page) if "openvino" in PAGES[page] and importlib.util.find_spec("openvino") else ():
        for command in (c for c in COMMANDS if "digits_openvino" in c and c in line):
            cli.main([*shlex.split(command), "--threads", "1"])
    if page.stem == "deploying":
        cli.main(["models/digits_cnn.onnx", "digits_4bit.onnx", "--effort", "fast", "--threads", "1", "--quiet"])
    scope: dict[str, object] = {}
    for block in blocks("python", page):
        if "import openvino" in block and not importlib.util.find_spec("openvino"):
            continue
        exec(compile(block, str(page), "exec"), scope)
    assert list(checkout.glob("*.onnx"))


def test_table_of_options_is_the_list_of_options() -> None:
    told = re.findall(r"^\| `(--[a-z0-9-]+)", PAGES[DOCS / "reference" / "options.md"], re.MULTILINE)
    assert sorted(told) == sorted(o for p in cli.command.params for o in p.opts if o.startswith("--"))


REPOSITORY = "https://github.com/rdoq-onnx/rdoq-onnx/blob/main/"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        if target.startswith(REPOSITORY):
            assert (ROOT / target.removeprefix(REPOSITORY)).exists(), target
        elif "://" not in target:
            assert (page.parent / target).exists(), target
