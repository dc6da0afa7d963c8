"""Read options from a TOML file, named as on the command line, which takes precedence."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rdoq_onnx.errors import ConfigError

TABLE = "rdoq-onnx"


@dataclass(frozen=True)
class Kind:
    """Whether an option is a flag, and whether it may be repeated (multiple)."""

    flag: bool = False
    multiple: bool = False


def table_of(document: Mapping[str, Any], whole: bool) -> Mapping[str, Any]:
    """Return [tool.rdoq-onnx] of a TOML document, or, if `whole` and there is none, the document itself."""
    tool = document.get("tool")
    table = tool.get(TABLE) if isinstance(tool, Mapping) else None
    if isinstance(table, Mapping):
        return table
    return document if whole else {}


def read_options(table: Mapping[str, Any], source: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Turn `table` into defaults for click: names with underscores, values as typed on the command line.

    kinds: all options. Raises ConfigError on a key that is not an option, or a value of the wrong kind.
    """
    return {
        key.replace("-", "_"): _typed(value, f"{source}: {key}", _kind(key, source, kinds))
        for key, value in table.items()
    }


def _kind(key: str, source: str, kinds: Mapping[str, Kind]) -> Kind:
    if key not in kinds:
        (nearest,) = difflib.get_close_matches(key, kinds, 1, 0.0)
        raise ConfigError(f"{source}: {key} is not an option; the nearest is {nearest}")
    return kinds[key]


def _typed(value: Any, where: str, kind: Kind) -> Any:
    if kind.flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} = {value!r}: give true or false")
        return value
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{where} = {value!r}: give a string or a number{', or a list' if kind.multiple else ''}")
    texts = [str(v) for v in values]
    return texts if kind.multiple else ",".join(texts)
