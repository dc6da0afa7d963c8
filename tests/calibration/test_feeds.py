"""Collating feeds: rows in sequence, constants once, inconsistent feeds refused by item."""

import itertools

import numpy as np
import pytest

from rdoq_onnx.calibration import feeds
from rdoq_onnx.calibration.feeds import collate, model_batch
from rdoq_onnx.calibration.load import MAX_FEEDS, load_samples
from rdoq_onnx.calibration.loaders import Transformed
from rdoq_onnx.calibration.pixels import Pixels
from rdoq_onnx.errors import CalibrationError, ModelError
from tests.calibration.test_load import SILERO, X, every, floats, refusal, spec


class Reader:
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def test_load_feeds():
    x = floats(6, 3)
    feeds = [{"x": x[:1]}, {"x": x[1:4]}, {"x": x[4:]}]
    for source, name in ((feeds, "feeds"), (iter(feeds), "feeds"), (Reader(feeds), "data reader")):
        samples = load_samples(source, [X], None)
        assert samples.source == name
        np.testing.assert_array_equal(every(samples)["x"], x)


def test_load_feeds_with_constants():
    feed = {"state": np.zeros((2, 1, 4), np.float32), "sr": np.int64(16000)}
    samples = load_samples([feed | {"input": floats(1, 7)} for _ in range(3)], SILERO, None)
    assert set(samples.constants) == {"state", "sr"}
    assert (len(samples), samples.batch) == (3, 1)
    assert [b["input"].shape for b in samples.batches(2)] == [(1, 7)] * 3
    assert "'sr'" in refusal([feed | {"input": floats(1, 7), "sr": np.int64(k)} for k in range(2)], *SILERO)
    assert "'state'" in refusal(
        [feed | {"input": floats(1, 7), "state": np.full((2, 1, 4), k)} for k in range(2)], *SILERO
    )


def test_load_feeds_refuses():
    assert "no samples" in refusal([], X)
    assert "item 1 is a list" in refusal([{"x": floats(1, 3)}, [1]], X)
    message = refusal([{"x": floats(1, 3)}, {"z": floats(1, 3)}], X)
    assert "item 1 has arrays 'z', item 0 has 'x'" in message
    message = refusal([{"x": floats(1, 3)}, {"x": floats(1, 4)}], X)
    assert "'x' of item 0 and item 1 has shapes (3,) and (4,)" in message
    message = refusal([{"x": floats(1, 3)}, {"x": np.zeros((1, 3))}], X)
    assert "'x' of item 0 and item 1 is float32 and float64; give one dtype" in message
    assert "Python objects" in refusal([{"x": np.array([[None]])}], X)
    assert "a int;" in refusal(3, X)


def test_no_more_samples_than_the_limit_are_read():
    read = []

    def feeds():
        for k in range(9):
            read.append(k)
            yield f"item {k}", {"x": floats(2, 3)}

    assert collate("here", feeds(), [X], limit=3)[0]["x"].shape[0] >= 3
    assert read == [0, 1]


class Unsized:
    """Feeds with a len() that raises, as ONNX Runtime's readers and PyTorch's streams have."""

    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        return ({"x": np.full((3, 3), k, np.float32)} for k in itertools.count())


@pytest.mark.parametrize("source", [Unsized, lambda: iter(Unsized())], ids=["object", "iterator"])
def test_feeds_without_a_length_are_capped(source):
    notes = []
    samples = load_samples(source(), [X], None, note=notes.append)
    assert len(samples) == MAX_FEEDS
    assert notes == ["feeds: took the first 1,024 samples, as the number is not known; --samples sets another"]
    assert len(load_samples(source(), [X], 6, note=notes.append)) == 6
    assert len(load_samples([{"x": floats(1, 3)}] * (MAX_FEEDS + 1), [X], None, note=notes.append)) == MAX_FEEDS + 1
    assert len(load_samples(iter([{"x": floats(1, 3)}] * 5), [X], None, note=notes.append)) == 5
    assert len(notes) == 1


def test_long_reading_is_noted(monkeypatch):
    monkeypatch.setattr(feeds, "EVERY", 0.0)
    notes = []
    assert [name for name, _ in feeds.watched("here", "abc", notes.append)] == ["item 0", "item 1", "item 2"]
    assert notes == ["here: 0 feeds read", "here: 1 feeds read", "here: 2 feeds read"]


def test_one_sample_without_the_batch_axis():
    x = floats(4, 3)
    found = collate("here", ((f"item {k}", {"x": row}) for k, row in enumerate(x)), [X])[0]
    np.testing.assert_array_equal(found["x"][...], x)


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(None, 3), (4, 3)], None),
        ([(1, 3), (4, 3)], 1),
        ([(4, 3), ()], 4),
    ],
)
def test_batch_size_of_the_model(shapes, size):
    assert model_batch([spec("x", *shape) for shape in shapes]) == size
    with pytest.raises(ModelError, match="no input with samples on axis 0"):
        model_batch([spec("x")])


def test_feeds_of_different_lengths_where_the_model_leaves_them_free():
    free = (spec("x", None, 3, None), spec("n", None, dtype="int64"))
    feeds = [{"x": floats(1, 3, 4 + k % 2), "n": np.array([k]), "y": np.arange(k)} for k in range(5)]
    samples = load_samples(feeds, free, None)
    found = [(f["x"].shape, f["n"].tolist()) for f in samples.batches(9)]
    assert found == [((3, 3, 4), [0, 2, 4]), ((2, 3, 5), [1, 3])]
    np.testing.assert_array_equal(next(samples.batches(9))["x"][1:2], feeds[2]["x"])
    assert len(load_samples(feeds, free, 3)) == 3
    assert "'x' of item 0 and item 1 has shapes (3, 4) and (2, 4)" in refusal(
        [feeds[0], {**feeds[0], "x": floats(1, 2, 4)}], *free
    )


def test_folder_of_arrays_of_different_lengths(tmp_path):
    for k in range(4):
        np.save(tmp_path / f"{k}.npy", floats(1 + k % 2, 3, 7 - k))
    samples = load_samples(tmp_path, [spec("x", None, 3, None)], None)
    assert [f["x"].shape for f in samples.batches(9)] == [(2, 3, 4), (1, 3, 5), (2, 3, 6), (1, 3, 7)]


def test_image_bytes_of_different_sizes_in_feeds():
    feeds = [{"x": np.full((1, 4 + k, 5, 3), k, np.uint8)} for k in range(2)]
    samples = load_samples(feeds, [spec("x", None, 3, None, None)], None, Pixels(mean=(0.0,) * 3, std=(1.0,) * 3))
    assert [f["x"].shape for f in samples.batches(9)] == [(1, 3, 4, 5), (1, 3, 5, 5)]


def test_several_shapes_with_a_fixed_batch():
    free = spec("x", 2, None)
    samples = load_samples([{"x": floats(2, 3 + k % 2)} for k in range(4)], [free], 5)
    assert [f["x"].shape for f in samples.batches(1)] == [(2, 3), (2, 4)]
    assert "give a multiple of 2" in refusal([{"x": floats(1, 3 + k % 2)} for k in range(3)], free)


def test_a_loader_gives_tuples_lists_or_arrays():
    x, labels = floats(6, 3), np.arange(6)
    sources = (
        [x[:2], x[2:]],
        [(x[:2],), (x[2:],)],
        [[x[:2], labels[:2]], [x[2:], labels[2:]]],
        [(row, label) for row, label in zip(x, labels, strict=True)],
    )
    for k, source in enumerate(sources):
        samples = load_samples(source, [X], None)
        np.testing.assert_array_equal(every(samples)["x"], x)
        assert samples.classes is None if k < 2 else samples.classes.tolist() == labels.tolist()


def test_arrays_of_a_tuple_are_in_the_order_of_the_inputs():
    inputs = [spec("a", None, 3), spec("b", None, 2)]
    a, b = floats(4, 3), floats(4, 2)
    samples = load_samples([(a[:1], b[:1]), (a[1:], b[1:])], inputs, None)
    np.testing.assert_array_equal(every(samples)["b"], b)
    assert "item 0 has 1 arrays, the model takes 'a', 'b'" in refusal([(a,)], *inputs)
    assert "item 0 is a list; give arrays" in refusal([[1.0, 2.0]], X)


def test_a_transform_makes_the_feeds():
    x = floats(4, 3)
    loader = [{"pixels": row, "label": 1} for row in x]
    samples = load_samples(Transformed(loader, lambda item: (item["pixels"], np.int64(item["label"]))), [X], None)
    np.testing.assert_array_equal(every(samples)["x"], x)
    assert samples.classes.tolist() == [1, 1, 1, 1]
    reader = Transformed(Reader([{"x": x[:1]}, {"x": x[1:]}]), lambda feed: {"x": 2 * feed["x"]})
    np.testing.assert_array_equal(every(load_samples(reader, [X], None))["x"], 2 * x)
    with pytest.raises(CalibrationError, match="transform applies to each feed of an iterable, not to arrays"):
        Transformed({"x": x}, lambda feed: feed)


@pytest.mark.parametrize("value", [np.zeros((2, 5, 5), np.int64), np.array(["a", "b"]), ["a", None], np.ones(2)])
def test_what_is_no_class_is_left_out(value):
    x = floats(4, 3)
    samples = load_samples([{"x": x[:2], "y": value}, {"x": x[2:], "y": value}], [X], None)
    np.testing.assert_array_equal(every(samples)["x"], x)
    assert samples.classes is None
