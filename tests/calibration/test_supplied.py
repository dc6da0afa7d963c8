"""Inputs that samples lack: what they are filled with, and where they are not."""

import re
from typing import Any

import numpy as np
import pytest

from rdoq_onnx.calibration.load import load_samples, synthetic
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.calibration.supplied import described, supplied
from rdoq_onnx.errors import CalibrationError

TOKENS = np.arange(30).reshape(6, 5) % 7
INT = np.dtype(np.int64)
FLOAT = np.dtype(np.float32)
IDS = InputSpec("input_ids", INT, (None, None))
MASK = InputSpec("attention_mask", INT, (None, None))
POSITIONS = InputSpec("position_ids", INT, (None, None))
SEGMENTS = InputSpec("token_type_ids", np.dtype(np.int32), (None, None))
CACHES = [InputSpec(f"past_key_values.0.{part}", FLOAT, (None, 2, None, 4)) for part in ("key", "value")]


def test_from_tokens_alone() -> None:
    specs = [IDS, MASK, POSITIONS, SEGMENTS, *CACHES]
    samples = load_samples({"input_ids": TOKENS}, specs, None)
    feeds = samples.feeds([1, 4])
    np.testing.assert_array_equal(feeds["input_ids"], TOKENS[[1, 4]])
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((2, 5)))
    np.testing.assert_array_equal(feeds["position_ids"], [range(5)] * 2)
    np.testing.assert_array_equal(feeds["token_type_ids"], np.zeros((2, 5)))
    assert {feeds[c.name].shape for c in CACHES} == {(2, 2, 0, 4)}
    assert all(feeds[s.name].dtype == s.dtype for s in specs)
    assert samples.supplied == tuple(s.name for s in specs[1:])
    assert described(samples.supplied) == (
        "attention_mask (ones), position_ids (0, 1, ...), token_type_ids (zeros), 2 empty caches"
    )


def test_behind_given_caches() -> None:
    caches = {c.name: np.zeros((6, 2, 3, 4), np.float32) for c in CACHES}
    feeds = load_samples({"input_ids": TOKENS, **caches}, [IDS, MASK, POSITIONS, *CACHES], None).feeds([0])
    np.testing.assert_array_equal(feeds["position_ids"], [[3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((1, 8)))


def test_positions_do_not_count_padding() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    feeds = load_samples({"input_ids": TOKENS[:2], "attention_mask": mask}, [IDS, MASK, POSITIONS], None).feeds([0, 1])
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]])


def test_some_caches_do_not_stand_for_others() -> None:
    given = {"input_ids": TOKENS, CACHES[0].name: np.zeros((6, 2, 3, 4), np.float32)}
    with pytest.raises(CalibrationError, match=r"no array for input 'past_key_values.0.value'"):
        load_samples(given, [IDS, *CACHES], None)


def test_lengths_of_grouped_attention() -> None:
    number = InputSpec("total_sequence_length", np.dtype(np.int32), ())
    past = InputSpec("past_sequence_length", np.dtype(np.int32), (1,))
    ends = InputSpec("seqlens_k", np.dtype(np.int32), (None, 1))
    given = supplied({"input_ids": TOKENS}, [IDS, number, past, ends, *CACHES])
    assert given["total_sequence_length"].shape == ()
    assert given["total_sequence_length"] == 5
    assert given["past_sequence_length"].tolist() == [0]
    assert given["seqlens_k"].tolist() == [[4]] * 6


def test_texts_of_different_lengths() -> None:
    feeds = [{"input_ids": TOKENS[:1, :k]} for k in (3, 5, 5)]
    samples = load_samples(feeds, [IDS, POSITIONS, *CACHES], None)
    assert [part.feeds([0])["position_ids"].tolist() for part in samples.by_shape()] == [[[0, 1, 2]], [[0, 1, 2, 3, 4]]]
    number = InputSpec("total_sequence_length", np.dtype(np.int32), ())
    with pytest.raises(CalibrationError, match="no array for input 'total_sequence_length'"):
        load_samples(feeds, [IDS, number], None)


def test_an_array_of_any_name_is_the_tokens() -> None:
    samples = load_samples({"x": TOKENS}, [IDS, MASK], None)
    np.testing.assert_array_equal(samples.feeds([2])["input_ids"], TOKENS[2:3])
    assert samples.supplied == ("attention_mask",)


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec("attention_mask", INT, (None, 1, None, None)),
        InputSpec("position_ids", INT, (None, 8)),
        InputSpec("past_key_values.0.key", FLOAT, (None, 2, 16, 4)),
        InputSpec("past_key_values.0.encoder.key", FLOAT, (None, 2, None, 4)),
        InputSpec("pixels", FLOAT, (None, 3, None, None)),
        InputSpec("state", FLOAT, (None, 2, None, 4)),
    ],
    ids=lambda s: f"{s.name} {s.shape}",
)
def test_other_inputs_must_be_given(spec: InputSpec) -> None:
    with pytest.raises(CalibrationError, match=re.escape(f"no array for input {spec.name!r}")):
        load_samples({"input_ids": TOKENS}, [IDS, spec], None)


def test_what_is_given_stays() -> None:
    given: dict[str, Any] = {"input_ids": TOKENS, "position_ids": TOKENS, "attention_mask": TOKENS % 2}
    samples = load_samples(given, [IDS, MASK, POSITIONS], None)
    assert samples.supplied == ()
    np.testing.assert_array_equal(samples.feeds([3])["position_ids"], TOKENS[3:4])


def test_synthetic_tokens() -> None:
    samples = synthetic([IDS, MASK, POSITIONS, *CACHES], 4, seed=0, integer_ranges={"input_ids": 9})
    feeds = samples.feeds(slice(None))
    assert samples.supplied == ("attention_mask", "position_ids", *(c.name for c in CACHES))
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape
    assert feeds["attention_mask"].all()
    assert feeds[CACHES[0].name].shape == (4, 2, 0, 4)
