"""Inputs of language models that samples may leave out, since their meaning is plain, for N texts of T tokens.

    position_ids             P, P + 1, ..., P + T - 1      [N, T]; P: tokens in the caches; padding is not counted
    attention_mask           ones                          [N, P + T]
    token_type_ids           zeros                         [N, T]
    past...                  caches without a token        [N, heads, 0, width]
    past_sequence_length     P                             one number, as total_sequence_length
    total_sequence_length    P + T
    seqlens_k                P + T - 1                     [N] or [N, 1]

The names are those of Hugging Face Optimum and onnxruntime-genai.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.rows import Rows
from rdoq_onnx.calibration.samples import InputSpec

TOKENS = ("input_ids", "inputs_embeds")
_NUMBERS = ("past_sequence_length", "total_sequence_length")
_CACHE = re.compile("past(?!.*(encoder|cross))")  # keys and values of an encoder are never empty

Array = NDArray[Any]


def supplied(stored: Mapping[str, Rows], specs: Sequence[InputSpec], numbers: bool = True) -> dict[str, Array]:
    """Values for those inputs `specs` that `stored`, samples of one shape, leaves out; only where they are plain.

    numbers: whether that includes inputs that are one number for all samples.
    """
    tokens = next((stored[name] for name in TOKENS if name in stored), None)
    missing = [spec for spec in specs if spec.name not in stored and (numbers or spec.name not in _NUMBERS)]
    if tokens is None or len(tokens.shape) < 2 or not missing:
        return {}
    count, length = tokens.shape[:2]
    caches = [shape for s in specs if s.name in stored and _is_cache(s) and len(shape := stored[s.name].shape) == 4]
    past = caches[0][2] if caches else 0
    values = {s.name: _value(s, count, past, length) for s in missing if not (_is_cache(s) and caches)}
    mask, positions = stored.get("attention_mask"), values.get("position_ids")
    if mask is not None and positions is not None and mask.shape == (count, past + length):
        places = np.maximum(np.cumsum(mask[...], axis=1) - 1, 0)[:, past:]
        values["position_ids"] = places.astype(positions.dtype)
    return {name: value for name, value in values.items() if value is not None}


def could_supply(spec: InputSpec) -> bool:
    """Whether samples may leave this input out."""
    return spec.name not in TOKENS and _value(spec, 1, 0, 1) is not None


def described(names: Sequence[str]) -> str:
    """Word which inputs were supplied, and with what."""
    words = [f"{name} ({_WORDS[name]})" for name in names if name in _WORDS]
    caches = len(names) - len(words)
    return ", ".join([*words, *([f"{caches} empty caches"] if caches else [])])


_WORDS = {
    "position_ids": "0, 1, ...",
    "attention_mask": "ones",
    "token_type_ids": "zeros",
    "past_sequence_length": "tokens in the caches",
    "total_sequence_length": "tokens",
    "seqlens_k": "tokens less 1",
}


def _is_cache(spec: InputSpec) -> bool:
    """Whether an input has the form of a cache of keys or values, [N, heads, free, width]."""
    fixed = [size is not None for size in spec.shape[1:]]
    return bool(_CACHE.match(spec.name)) and spec.dtype.kind == "f" and fixed == [True, False, True]


def _value(spec: InputSpec, count: int, past: int, length: int) -> Array | None:
    """The value of an input; None if its meaning is not plain, or its shape another."""
    if _is_cache(spec):
        return np.zeros((count, spec.shape[1] or 0, 0, spec.shape[3] or 0), spec.dtype)
    if spec.name not in _WORDS or spec.dtype.kind not in "iufb":
        return None
    total = past + length
    rows: dict[str, Array] = {
        "position_ids": np.arange(past, total),
        "attention_mask": np.ones(total),
        "token_type_ids": np.zeros(length),
    }
    if spec.name in rows:
        row = rows[spec.name].astype(spec.dtype)
        fits = len(spec.shape) == 2 and spec.shape[1] in (None, len(row))
        return np.broadcast_to(row, (count, len(row))) if fits else None
    if spec.name == "seqlens_k":
        fits = spec.shape[1:] in ((), (1,)) and len(spec.shape) > 0
        return np.full((count, 1)[: len(spec.shape)], total - 1, spec.dtype) if fits else None
    number = past if spec.name == "past_sequence_length" else total
    return np.full((1,) * len(spec.shape), number, spec.dtype) if spec.shape in ((), (1,)) else None
