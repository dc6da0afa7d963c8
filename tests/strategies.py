"""Hypothesis strategies, one for each kind of input; a new feature is added here."""

import numpy as np
from hypothesis import strategies as st

from rdoq_onnx.curves import Curves


@st.composite
def curves(draw, min_units=1, max_units=5, max_widths=5, max_elements=12, ties=True):
    """Curves like measured ones: falling, noisy, not convex, some points disallowed, some units dead.

    ties: also small integers as distortions, so that slopes coincide, and distortions of zero.
    """
    widths = np.array(sorted(draw(st.sets(st.integers(0, 16), min_size=1, max_size=max_widths))))
    units = draw(st.integers(min_units, max_units))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    elements = rng.integers(1, draw(st.integers(1, max_elements)), units, endpoint=True)
    shape = (units, widths.size)
    kinds = ["falling", "noise", *(["integers"] if ties else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "falling":
        level = 10.0 ** rng.uniform(-3, 3, (units, 1))
        distortion = level * rng.uniform(1.2, 5, (units, 1)) ** -widths * rng.lognormal(0, 0.4, shape)
    elif kind == "noise":
        distortion = rng.random(shape)
    else:
        distortion = rng.integers(0, draw(st.integers(0, 6)), shape, endpoint=True).astype(float)
    if draw(st.booleans()):
        distortion[rng.random(shape) < 0.3] = np.inf
        kept = rng.integers(widths.size, size=units)
        distortion[np.arange(units), kept] = rng.random(units)
    if ties and draw(st.booleans()):
        distortion[rng.integers(units)] = 0.0
    return Curves(widths, elements, distortion)


def rate_range(curves):
    """The least budget that can be met, and the least that buys every unit its widest width."""
    finite = np.isfinite(curves.distortion)
    least = np.where(finite, curves.rate, np.iinfo(np.int64).max).min(axis=1)
    most = np.where(finite, curves.rate, 0).max(axis=1)
    return int(least.sum()), int(most.sum())


@st.composite
def curves_and_budget(draw, **kwargs):
    """Curves and a budget that can be met, now and then an ample one."""
    drawn = draw(curves(**kwargs))
    least, most = rate_range(drawn)
    return drawn, draw(st.integers(least, most + 3))
