"""Keyword arguments of the Python API: their types, and how they become fields of Config."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from rdoq_onnx.config import Config, Distortion, Effort, Measure, Provider, option_of, optional
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import Amount, Cost, parse_amount, preset
from rdoq_onnx.options import parse_blocks, parse_bytes, parse_numbers, parse_pin, parse_widths
from rdoq_onnx.targets import Storage, TargetName

Pins = Mapping[str, int] | Iterable[str | tuple[str, int]] | str
Numbers = float | Iterable[float] | str
Bytes = int | str


class Options(TypedDict, total=False):
    """What `quantize` and `measure` take beside their own arguments: fields of `config.Config`, which explains them.

    Text is taken as on the command line, such as size="30kB" or widths="2-8".
    """

    sqnr: float | None
    top1_agreement: float | None
    joint: bool
    widths: Iterable[int] | int | str
    block_size: Iterable[int] | int | str | None
    pins: Pins
    exclude: Iterable[str] | str
    exclude_ops: Iterable[str] | str
    size: Bytes | None
    layer_limit: Bytes | None
    layer_limit_activations: bool
    cost: str | Path | Cost | None
    budget: float | str | Amount | None
    samples: int | None
    image_scale: float | None
    image_mean: Numbers | None
    image_std: Numbers | None
    measure: Measure
    distortion: Distortion
    effort: Effort
    minutes: float | None
    seed: int
    provider: Provider
    target: TargetName
    storage: Storage | None
    keep_channels: bool
    threads: int
    min_sqnr: float | None
    max_bytes: Bytes | None
    scratch: str | None
    memory: Bytes | None
    workers: int | str | None


def keywords(given: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """Turn keyword arguments of the Python API into fields of Config; text is parsed as on the command line.

    also: further keywords, to suggest. Raises ConfigError on an unknown keyword, or a value of the wrong type.
    """
    known = [f.name for f in fields(Config)]
    for name in given:
        if name not in known:
            (nearest,) = difflib.get_close_matches(name, [*known, *also], 1, 0.0)
            raise ConfigError(f"{name} is not an option; the nearest is {nearest}")
    taken: dict[str, Callable[[str, Any], Any]] = {name: _KEYWORDS.get(name, _text) for name in given}
    return {name: take(option_of(name), given[name]) for name, take in taken.items()}


def _workers(option: str, value: Any) -> str:
    return _text(option, value) if isinstance(value, str) else str(_whole(option, value))


def number(option: str, value: Any) -> float:
    """Take a number, or text that holds one. Raises ConfigError on anything else."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    with suppress(ValueError):
        if isinstance(value, str):
            return float(value)
    raise ConfigError(f"{option} {value!r} is not a number")


def _whole(option: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,30}\s*", value):
        return int(value)
    found = number(option, value)
    if not (math.isfinite(found) and found == int(found)):
        raise ConfigError(f"{option} {value!r} is not a whole number")
    return int(found)


def flag(option: str, value: Any) -> bool:
    """Take True or False. Raises ConfigError on anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{option} {value!r}: give True or False")
    return bool(value)


def _text(option: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{option} {value!r} is not a name; give a string")
    return value


def _several(option: str, value: Any, one: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """Take one value or an iterable of them."""
    value = value.reshape(-1) if isinstance(value, np.ndarray) else value  # one without axes cannot be iterated
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(one(option, v) for v in values)


def _listed(parse: Callable[[str], Any], one: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Take text as on the command line, one number or several."""
    return lambda option, value: parse(value) if isinstance(value, str) else _several(option, value, one)


def _size(option: str, value: Any) -> int | None:
    return parse_bytes(option, value) if isinstance(value, str) else _whole(option, value)


def _one_pin(option: str, value: Any) -> tuple[str, int]:
    if isinstance(value, str):
        return parse_pin(value)
    if isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], str):
        return value[0], _whole(f"{option} {value[0]}", value[1])
    raise ConfigError(f"{option} {value!r} is not a pattern with its bits; give for example {{'conv1.*': 8}}")


def pins_of(option: str, value: Any) -> tuple[tuple[str, int], ...]:
    """Take pins as a dict, as pairs of a pattern and its bits, or as text "PATTERN=BITS". Raises ConfigError."""
    pairs = isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], str) and "=" not in value[0]
    if isinstance(value, Mapping) or (pairs and not isinstance(value, str)):
        value = value.items() if isinstance(value, Mapping) else [value]
    return _several(option, value, _one_pin)


def _known_cost(option: str, value: Any) -> Cost:
    return value if isinstance(value, Cost) else preset(_text(option, value))


def _amount(option: str, value: Any) -> Amount:
    """Take a number, or text without a unit, in that of the cost, which is not known here."""
    if isinstance(value, Amount):
        return value
    return parse_amount(option, value, "") if isinstance(value, str) else Amount(number(option, value))


_NUMBERS = ("activation_bits", "sqnr", "top1_agreement", "image_scale", "min_sqnr", "minutes")
_SIZES = ("size", "layer_limit", "max_bytes", "memory")
# For each field of Config that is not just text, what makes it from a keyword argument.
_KEYWORDS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(_NUMBERS, optional(number)),
    **dict.fromkeys(_SIZES, optional(_size)),
    **dict.fromkeys(("joint", "keep_channels", "layer_limit_activations"), flag),
    **dict.fromkeys(("seed", "threads"), _whole),
    "weight_bits": number,
    "workers": optional(_workers),
    "samples": optional(_whole),
    "storage": optional(_text),
    "scratch": optional(_text),
    "widths": _listed(parse_widths, _whole),
    "block_size": optional(_listed(parse_blocks, _whole)),
    "pins": pins_of,
    "cost": optional(_known_cost),
    "budget": optional(_amount),
    **dict.fromkeys(("exclude", "exclude_ops"), partial(_several, one=_text)),
    **{
        name: optional(_listed(partial(parse_numbers, option_of(name)), number)) for name in ("image_mean", "image_std")
    },
}
