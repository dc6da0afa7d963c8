"""Feeds as data loaders give them: dicts, tuples, lists or bare arrays, and a function applied to each."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.calibration.supplied import could_supply
from rdoq_onnx.errors import CalibrationError

LABELS = "y"


@dataclass(frozen=True)
class Transformed:
    """A data loader or reader whose items go through `function` first."""

    source: Any
    function: Callable[[Any], Any]

    def __post_init__(self) -> None:
        if isinstance(self.source, str | Path | Mapping) or not (
            isinstance(self.source, Iterable) or hasattr(self.source, "get_next")
        ):
            raise CalibrationError(f"transform applies to each feed of an iterable, not to {_kind(self.source)}")

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        items = iter(self.source.get_next, None) if hasattr(self.source, "get_next") else self.source
        return map(self.function, items)


def as_feed(label: str, item: str, value: Any, specs: Sequence[InputSpec]) -> Mapping[str, Any]:
    """Name the arrays of one feed: those of a tuple or list in the order of the inputs, then the labels if there are.

    Raises CalibrationError for anything else.
    """
    if isinstance(value, Mapping):
        return value
    names = [s.name for s in specs if len(specs) == 1 or not could_supply(s)]
    if hasattr(value, "__array__"):
        value = (value,)
    if not isinstance(value, tuple | list) or not all(hasattr(each, "__array__") for each in value):
        raise CalibrationError(f"{label}: {item} is a {type(value).__name__}; give arrays, or a dict of arrays by name")
    if len(value) == len(names) + 1:
        return dict(zip([*names, LABELS], value, strict=True))
    if len(value) not in (len(names), len(specs)):
        listed = ", ".join(map(repr, names))
        raise CalibrationError(f"{label}: {item} has {len(value)} arrays, the model takes {listed}; give one for each")
    return dict(zip(names if len(value) == len(names) else [s.name for s in specs], value, strict=True))


def _kind(source: Any) -> str:
    return "arrays" if isinstance(source, Mapping) else repr(str(source)) if source is not None else "synthetic samples"
