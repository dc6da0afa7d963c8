"""Tables as plain text."""

import sys
from collections.abc import Iterable


def write(cells: Iterable[str], sizes: Iterable[int]) -> None:
    """One line of a table, at once; a negative size aligns to the left."""
    padded = (c.ljust(-size) if size < 0 else c.rjust(size) for c, size in zip(cells, sizes, strict=True))
    sys.stdout.write(" ".join(padded).rstrip() + "\n")
    sys.stdout.flush()
