"""Tables as plain text."""

import argparse
import sys
from collections.abc import Iterable


def parser(description: str | None, tables: Iterable[str], models: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments of a script that prints several tables of several models."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", action="append", choices=list(tables), help="may be repeated")
    made.add_argument("--model", action="append", choices=list(models), help="may be repeated")
    return made


def write(cells: Iterable[str], sizes: Iterable[int]) -> None:
    """One line of a table, at once; a negative size aligns to the left."""
    padded = (c.ljust(-size) if size < 0 else c.rjust(size) for c, size in zip(cells, sizes, strict=True))
    sys.stdout.write(" ".join(padded).rstrip() + "\n")
    sys.stdout.flush()
