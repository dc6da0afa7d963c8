"""Print tables as plain text or Markdown."""

import argparse
import sys
from collections.abc import Iterable, Sequence


def parser(description: str | None, tables: Iterable[str], models: Iterable[str]) -> argparse.ArgumentParser:
    """Make the parser of a script that prints several tables of several models."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", action="append", choices=list(tables), help="may be repeated")
    arguments.add_argument("--model", action="append", choices=list(models), help="may be repeated")
    return arguments


def write(cells: Iterable[str], sizes: Iterable[int]) -> None:
    """Print one line of a table and flush; a negative size aligns to the left."""
    padded = (c.ljust(-size) if size < 0 else c.rjust(size) for c, size in zip(cells, sizes, strict=True))
    sys.stdout.write(" ".join(padded).rstrip() + "\n")
    sys.stdout.flush()


def write_markdown(title: str, head: Sequence[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a Markdown table below its title, each row as soon as it is there."""
    sys.stdout.write(f"\n{title}\n\n")
    for line in (head, ["---"] * len(head)):
        sys.stdout.write(f"| {' | '.join(line)} |\n")
    for cells in rows:
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()
