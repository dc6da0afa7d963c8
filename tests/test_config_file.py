"""Options from TOML: same names and values as on the command line, and errors that name file and key."""

import sys
from pathlib import Path
from typing import Any

import pytest

from rdoq_onnx import cli
from rdoq_onnx.config_file import Kind, read_options, table_of
from rdoq_onnx.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = {"weight-bits": Kind(), "widths": Kind(), "pin": Kind(multiple=True), "joint": Kind(flag=True)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("weight-bits = 3.5", {"weight_bits": "3.5"}),
        ("weight-bits = '4'", {"weight_bits": "4"}),
        ("widths = [2, 4, 8]", {"widths": "2,4,8"}),
        ("pin = ['a=3', 'b=4']", {"pin": ["a=3", "b=4"]}),
        ("pin = 'a=3'", {"pin": ["a=3"]}),
        ("joint = true", {"joint": True}),
    ],
)
def test_values_are_as_typed_on_the_command_line(text: str, found: dict[str, Any]) -> None:
    assert read_options(tomllib.loads(text), "f.toml", KINDS) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wieght-bits = 4", "f.toml: wieght-bits is not an option; the nearest is weight-bits"),
        ("weight_bits = 4", "f.toml: weight_bits is not an option; the nearest is weight-bits"),
        ("joint = 'yes'", "f.toml: joint = 'yes': give true or false"),
        ("weight-bits = true", "f.toml: weight-bits = True: give a string or a number"),
        ("pin = { a = 3 }", "f.toml: pin = {'a': 3}: give a string or a number, or a list"),
    ],
)
def test_unknown_options_and_wrong_values(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_options(tomllib.loads(text), "f.toml", KINDS)
    assert str(error.value) == said


def test_table_of_a_project_or_a_file_of_its_own() -> None:
    own, project = {"bits": 4}, {"project": {"name": "x"}, "tool": {"rdoq-onnx": {"bits": 4}}}
    assert table_of(own, whole=True) == own
    assert table_of(project, whole=True) == own
    assert table_of(project, whole=False) == own
    assert table_of({"tool": {"ruff": {}}}, whole=False) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--widths 'from the project' is not a list"),
        (["--widths", "typed"], "--widths 'typed' is not a list"),
        (["--config", "own.toml"], "--widths 'from its own file' is not a list"),
        (["--config", "none_such.toml"], "none_such.toml: cannot be read"),
        (["--config", "broken.toml"], "broken.toml: is not valid TOML"),
        (["--config", "unknown.toml"], "unknown.toml: bitz is not an option; the nearest is bits"),
        (["--config", "input.toml"], "input.toml: input is not an option"),
    ],
)
def test_which_file_is_read_and_what_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "pyproject.toml": "[tool.rdoq-onnx]\nwidths = 'from the project'",
        "own.toml": "widths = 'from its own file'",
        "broken.toml": "widths =",
        "unknown.toml": "bitz = 4",
        "input.toml": "input = 'x'",
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(["in.onnx", "out.onnx", *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
