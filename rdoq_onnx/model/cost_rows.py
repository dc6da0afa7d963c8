"""What a budget in the user's unit counts: a preset, or the rows of a CSV file.

    layer,weight_bits,activation_bits,cost
    /0/Conv,8,8,41.5
    /2/.*,1-4,*,12

A row states the cost of each node whose name, or whose weight's name, matches `layer` (a name, or a regular expression
for all of it) at these widths: a number of bits, a range of them, `float`, or `*` for any. Where several rows match,
the last one counts. A fourth column named `cost_us` gives the unit.
"""

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rdoq_onnx.errors import ConfigError

FLOAT = 32  # bits of what is not quantized
WIDEST = 8
Preset = Literal["size", "bops", "measured"]
PRESETS: dict[str, str] = {"size": "bytes", "bops": "bit operations", "measured": "us"}
HEADER = ("layer", "weight_bits", "activation_bits", "cost")
TIMES = {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}  # in microseconds
_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class CostRow:
    """The cost of each node that `pattern` matches, at all widths within these ranges, first and last included."""

    pattern: str
    weight_bits: tuple[int, int]
    activation_bits: tuple[int, int]
    cost: float


@dataclass(frozen=True)
class Cost:
    """What a budget counts, in `unit`.

    name: a preset, or the file of the rows. interpolated: whether a width between those of two rows costs what the
    line between them says; else such widths are not allowed.
    """

    name: str
    unit: str = ""
    rows: tuple[CostRow, ...] = ()
    interpolated: bool = False

    @property
    def preset(self) -> bool:
        """Whether costs follow from the network, not from rows."""
        return not self.rows and self.name in get_args(Preset)

    @property
    def identity(self) -> str:
        """The preset, or a digest of the rows: the same ones from another path are the same cost."""
        rows = repr((self.rows, self.interpolated)).encode()
        return f"sha256:{hashlib.sha256(rows).hexdigest()}" if self.rows else self.name

    @property
    def unmeasured(self) -> bool:
        return self.preset and self.name == "measured"


@dataclass(frozen=True)
class Amount:
    """A budget: a cost in its unit, or a percentage of what 8 bits everywhere cost."""

    value: float
    percent: bool = False

    def of(self, whole: float) -> float:
        return self.value * whole / 100 if self.percent else self.value


def preset(name: str) -> Cost:
    """Return the preset of this name. Raises ConfigError if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"--cost {name!r}: give a CSV file, or one of {', '.join(PRESETS)}")
    return Cost(name, PRESETS[name])


def parse_cost(text: str, source: str, interpolated: bool = False) -> Cost:
    """Parse the CSV `text` of the file `source`. Raises ConfigError with the line at fault."""
    try:
        lines = list(csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True))
    except csv.Error as error:
        raise ConfigError(f"{source}: is not valid CSV ({error}); correct it") from error
    head, rows = ([cell.strip() for cell in lines[0]] if lines else []), lines[1:]
    named = re.fullmatch(r"cost(?:_(.+))?", head[3]) if len(head) == len(HEADER) else None
    if tuple(head[:3]) != HEADER[:3] or named is None:
        raise ConfigError(f"{source}: its first line must be {','.join(HEADER)}, with cost or cost_UNIT")
    if len(rows) > _MOST_ROWS:
        raise ConfigError(f"{source}: has {len(rows)} rows; give at most {_MOST_ROWS}")
    parsed = tuple(_rows(rows, source))
    if not parsed:
        raise ConfigError(f"{source}: has no rows; --cost-template FILE writes those of a model to fill in")
    return Cost(source, named[1] or "", parsed, interpolated)


def _rows(rows: Sequence[Sequence[str]], source: str) -> Iterator[CostRow]:
    for number, row in enumerate(rows, 2):
        cells, where = [cell.strip() for cell in row], f"{source}, line {number}"
        if not any(cells):
            continue
        if len(cells) != len(HEADER):
            raise ConfigError(f"{where}: has {len(cells)} cells; give {', '.join(HEADER)}")
        try:
            re.compile(cells[0])
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}: layer {cells[0]!r} is not a valid regular expression: {error}") from error
        yield CostRow(cells[0], _widths(cells[1], where), _widths(cells[2], where), _cost(cells[3], where))


def _widths(cell: str, where: str) -> tuple[int, int]:
    if cell == "*":
        return 0, FLOAT
    if cell in ("float", str(FLOAT)):
        return FLOAT, FLOAT
    ends = re.fullmatch(r"(\d{1,2})(?:\s*-\s*(\d{1,2}))?", cell)
    if ends:
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if first <= last <= WIDEST:
            return first, last
    raise ConfigError(f"{where}: width {cell!r}; give 0 to {WIDEST}, a range such as 1-4, float, or *")


def _cost(cell: str, where: str) -> float:
    try:
        cost = float(cell)
    except ValueError:
        cost = math.nan
    if not (math.isfinite(cost) and cost >= 0):
        raise ConfigError(f"{where}: cost {cell!r}; give a number of 0 or more")
    return cost


def parse_amount(option: str, text: str, unit: str) -> Amount:
    """Parse "12G", "40%", of bytes also "1.5MB" and of times "3ms", into a budget in `unit`. Raises ConfigError."""
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)\s*(%|[kKMGT]?)(i?)(B|us|µs|ms|s)?\s*", text)
    suffix = parts[4] if parts else None
    fits = suffix is None or (unit == "bytes" if suffix == "B" else unit in TIMES)
    if not parts or not fits or (parts[2] == "%" and suffix) or (parts[3] and suffix != "B"):
        example = {"bytes": "1.5MB, ", "us": "3ms, "}.get(unit, "")
        raise ConfigError(f"{option} {text!r} is not a budget; give for example {example}12G or 40%")
    value = float(parts[1])
    if parts[2] == "%":
        return Amount(value, percent=True)
    value *= (1024 if parts[3] else 1000) ** " KMGT".index((parts[2] or " ").upper())
    return Amount(value * TIMES[suffix] / TIMES[unit] if suffix in TIMES and suffix else value)
