"""Random combinations of all options: a documented exit code, one line for an error, and the output untouched."""

import contextlib
import tempfile
from pathlib import Path

import click
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdoq_onnx import cli
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.keywords import keywords
from tests.fuzz_options import prepare, run
from tests.option_strategies import OPTIONS, combinations, keyword_values


def test_every_option_is_drawn():
    declared = {o for p in cli.command.params if isinstance(p, click.Option) for o in p.opts}
    assert declared - {"--config", "--version", "--help", "-h"} == set(OPTIONS)


@settings(
    max_examples=200,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(combinations())
def test_exit_codes(combination):
    """A small share of `python -m tests.fuzz_options`."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), combination.model)
        outcome, said = run(combination, Path(folder))
        assert not outcome.startswith("FAULT"), f"{outcome}\n{said}"


@settings(max_examples=300, derandomize=True)
@given(st.dictionaries(st.sampled_from([*Config.__dataclass_fields__, "bit", "pin", ""]), keyword_values(), max_size=3))
def test_keywords_of_the_python_api(given):
    with contextlib.suppress(ConfigError):
        Config(**keywords(given))
