"""The cost and budgets that the options of a run give, with their short forms."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import PRESETS, TIMES, Amount, Cost, parse_amount, parse_cost, preset
from rdoq_onnx.system import io

OPTIONS = ("cost", "budget", "bops", "latency", "interpolate")


@dataclass(frozen=True)
class Given:
    """budgets: by their text as typed; none for a cost that is only reported. option: what they were given with."""

    cost: Cost | None = None
    budgets: tuple[tuple[str, Amount], ...] = ()
    option: str = "--budget"


def given_costs(typed: Mapping[str, Any]) -> Given:
    """Read what the options `OPTIONS` say. Raises ConfigError."""
    short = {f"--{name}": typed[name] for name in ("budget", "bops", "latency") if typed[name] is not None}
    if len(short) > 1:
        raise ConfigError(f"{' and '.join(short)} are both budgets; give one")
    option, texts = next(iter(short.items()), ("--budget", None))
    name = typed["cost"]
    if option == "--bops" and name not in (None, "bops"):
        raise ConfigError(f"--bops is short for --cost bops --budget, so it cannot go with --cost {name}")
    if name is None:
        name = {"--bops": "bops", "--latency": "measured"}.get(option)
    if name is None:
        if texts is not None:
            raise ConfigError("--budget counts what --cost says; give --cost too, or --bops")
        if typed["interpolate"]:
            raise ConfigError("--interpolate says how to read a --cost file; give one")
        return Given()
    cost = read_cost(name, typed["interpolate"])
    if option == "--latency" and cost.unit not in TIMES:
        raise ConfigError(f"--latency is a time, but --cost {name} is none; name its last column cost_us")
    listed = [] if texts is None else [text.strip() for text in texts.split(",")]
    return Given(cost, tuple((text, parse_amount(option, text, cost.unit)) for text in listed), option)


def read_cost(name: str, interpolated: bool = False) -> Cost:
    """Return the preset of this name, or read the file. Raises ConfigError."""
    if name in PRESETS:
        if interpolated:
            raise ConfigError(f"--interpolate says how to read a --cost file, and {name!r} is none")
        return preset(name)
    try:
        text = io.read_text(name)
    except ConfigError as error:
        if not Path(name).suffix:
            raise ConfigError(f"--cost {name!r}: give a CSV file, or one of {', '.join(PRESETS)}") from error
        raise
    return parse_cost(text, name, interpolated)
