"""Print tables as plain text."""

import argparse
import sys
from collections.abc import Iterable


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
