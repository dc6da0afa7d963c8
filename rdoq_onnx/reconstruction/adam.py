"""Adam (Kingma and Ba, ICLR 2015) over arrays, with a rate of learning η for each.

m ← β1 m + (1 - β1) g,    v ← β2 v + (1 - β2) g²,    x ← x - η (m / (1 - β1^k)) / (√(v / (1 - β2^k)) + ε)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_FIRST, _SECOND = 0.95, 0.99  # β1, β2: gradients of few samples are noisy, and noise must not move integers
_EPSILON = 1e-12  # gradients of a mean over many elements are small


@dataclass(frozen=True)
class Adam:
    """The moments of `arrays`, which `step` changes in place."""

    arrays: tuple[Floats, ...]
    means: tuple[Floats, ...]
    squares: tuple[Floats, ...]

    @classmethod
    def of(cls, arrays: Sequence[Floats]) -> "Adam":
        zeros = [tuple(np.zeros_like(x) for x in arrays) for _ in range(2)]
        return cls(tuple(arrays), *zeros)

    def step(self, gradients: Sequence[Floats], rates: Sequence[float], count: int) -> None:
        """Take step number `count`, from 1, against `gradients`."""
        first, second = 1 - _FIRST**count, 1 - _SECOND**count
        for x, g, m, v, rate in zip(self.arrays, gradients, self.means, self.squares, rates, strict=True):
            m += np.float32(1 - _FIRST) * (g - m)
            v += np.float32(1 - _SECOND) * (np.square(g) - v)
            x -= np.float32(rate / first) * m / (np.sqrt(v / np.float32(second)) + np.float32(_EPSILON))
