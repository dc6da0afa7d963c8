"""The bundled decoder, with and without caches: it keeps what it has learnt when quantized.

Judged by its perplexity on the test texts and by KL of the quantized from the float distributions, nats per character.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from rdoq_onnx.api import quantize
from tests.conftest import ROOT, OrtRun, load_plays, plays_feeds

Array = NDArray[Any]

PLAIN, CACHED = (ROOT / "models" / f"plays_decoder{form}.onnx" for form in ("", "_cached"))
FLOAT = 5.631  # perplexity


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def perplexity(logits: Array, tokens: Array) -> float:
    chosen = np.take_along_axis(log_softmax(logits)[:, :-1], tokens[:, 1:, None], -1)
    return float(np.exp(-chosen.mean()))


def divergence(reference: Array, logits: Array) -> float:
    """KL(p, q), averaged over the characters."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def named(model: onnx.ModelProto, values: list[Array]) -> dict[str, Array]:
    return {o.name: value for o, value in zip(model.graph.output, values, strict=True)}


def continued(model: onnx.ModelProto, tokens: Array, first: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds of a call that goes on with `tokens`, all that was read so far, behind the outputs `first`."""
    past = first["present.0.key"].shape[2]
    feeds = {n.replace("present", "past_key_values"): v for n, v in first.items() if n.startswith("present")}
    positions = np.broadcast_to(np.arange(past, tokens.shape[1]), tokens[:, past:].shape)
    return feeds | {
        "input_ids": tokens[:, past:],
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.ascontiguousarray(positions),
    }


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int64]:
    return load_plays("test")


@pytest.fixture(scope="module")
def reference(tokens: Array, ort_run: OrtRun) -> Array:
    model = onnx.load(PLAIN)
    (logits,) = ort_run(model, plays_feeds(model, tokens))
    return logits


def test_perplexity_of_the_readme(reference: Array, tokens: Array) -> None:
    assert perplexity(reference, tokens) == pytest.approx(FLOAT, abs=2e-3)


def test_both_forms_compute_the_same(reference: Array, tokens: Array, ort_run: OrtRun) -> None:
    """All at once from empty caches, and in two calls."""
    model = onnx.load(CACHED)
    whole = named(model, ort_run(model, plays_feeds(model, tokens)))
    np.testing.assert_allclose(whole["logits"], reference, atol=1e-4)
    first = named(model, ort_run(model, plays_feeds(model, tokens[:, :40])))
    second = named(model, ort_run(model, continued(model, tokens, first)))
    np.testing.assert_allclose(second["logits"], reference[:, 40:], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "least_db", "most_kl", "most_loss"),
    [
        ({"weight_bits": 4, "activation_bits": "none"}, 18, 0.05, 1.04),
        ({"bits": 8}, 26, 0.01, 1.01),
    ],
    ids=["weights only", "W8A8"],
)
@pytest.mark.parametrize("path", [PLAIN, CACHED], ids=lambda p: p.stem)
def test_quality(
    path: Path,
    options: dict[str, Any],
    least_db: float,
    most_kl: float,
    most_loss: float,
    reference: Array,
    tokens: Array,
    ort_run: OrtRun,
) -> None:
    model = onnx.load(path)
    calibration = {"input_ids": load_plays("calib")}
    result = quantize(model, calibration=calibration, effort="fast", samples=48, threads=1, **options)
    assert result.report.sqnr_db > least_db
    assert [i.name for i in result.model.graph.input] == [i.name for i in model.graph.input]
    assert [o.name for o in result.model.graph.output] == [o.name for o in model.graph.output]
    outputs = named(model, ort_run(result.model, plays_feeds(model, tokens), "all"))
    assert divergence(reference, outputs["logits"]) < most_kl
    assert perplexity(outputs["logits"], tokens) < most_loss * FLOAT
    if path == CACHED:
        first = named(model, ort_run(result.model, plays_feeds(model, tokens[:, :40]), "all"))
        second = named(model, ort_run(result.model, continued(model, tokens, first), "all"))
        assert divergence(reference[:, 40:], second["logits"]) < most_kl
