"""Moments with augmented copies of images: where they are made, and which layers take them."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.candidates.more_images import MOST, better_suited, number_of_copies, with_copies
from rdoq_onnx.config import Config
from rdoq_onnx.passes import run_passes

CHANNELS = 24


def two_convolutions(shape="N,3,8,8"):
    """Two convolutions, the second of which has CHANNELS inputs behind a window of 9."""
    model = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{shape}] x) => (float[N,4,8,8] y) {{
            a = Conv(x, first)
            y = Conv<pads = [1, 1, 1, 1]>(a, second)
        }}""")
    rng, inputs = np.random.default_rng(0), int(shape.split(",")[1])
    for name, size in {"first": (CHANNELS, inputs, 1, 1), "second": (4, CHANNELS, 3, 3)}.items():
        values = rng.standard_normal(size).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def network(shape="N,3,8,8"):
    return analyse(run_passes(NORMALIZE, two_convolutions(shape)), Config().selection)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ("N,3,8,8", 10, 40),  # fewer images than channels
        ("1,1,8,8", 10, 40),
        ("N,3,8,8", CHANNELS, 0),
        ("N,3,8,8", 1, 0),
        ("N,4,8,8", 10, 0),  # not an image
        ("2,3,8,8", 10, 0),  # a batch of fixed size
    ],
)
def test_few_images_have_copies(shape, count, expected):
    assert number_of_copies(network(shape), count) == expected


def test_images_and_copies_are_bounded(monkeypatch):
    monkeypatch.setattr("rdoq_onnx.candidates.more_images.MOST", 25)
    assert number_of_copies(network(), 10) == 15
    assert MOST > 25


def test_copies_come_behind_the_images():
    images = np.random.default_rng(0).random((10, 3, 8, 8)).astype(np.float32)
    samples = Samples("test", {"x": images})
    more = with_copies(network(), samples, 0)
    assert len(more) == 50
    np.testing.assert_array_equal(more.feeds(slice(0, 10))["x"], images)
    assert with_copies(network(), samples.take(slice(0, 1)), 0) is None
    assert with_copies(network(), Samples("test", {"x": images}, rows=2), 0) is None


def test_only_layers_that_are_better_off_are_rounded_with_copies(monkeypatch):
    samples = {"x": np.random.default_rng(0).random((24, 3, 8, 8)).astype(np.float32)}

    def codes(effort):
        measurement = rdoq_onnx.measure(two_convolutions(), samples, effort=effort, widths=[3], threads=1)
        return [each.codes[3].integers for each in measurement.layers]

    def second(layers, own, wider, unseen):
        assert [len(unseen), wider[0].vectors / own[0].vectors] == [2, 5]
        return {layers[1]: wider[1]}

    monkeypatch.setattr("rdoq_onnx.curves.steps.better_suited", lambda *moments: {})
    without = codes("best")
    monkeypatch.setattr("rdoq_onnx.curves.steps.better_suited", second)
    found = codes("best")
    assert (found[0] == without[0]).all()
    assert (found[1] != without[1]).any()
    for one, other in zip(codes("default"), without, strict=True):
        assert (one == other).all()


def moments(vectors):
    return Moments(vectors.mean(axis=0)[None], np.cov(vectors.T, bias=True)[None], vectors=len(vectors))


def test_a_layer_takes_the_moments_under_which_other_samples_are_likelier():
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((12, 12)) * 0.3 + np.eye(12)
    few, more, unseen = (moments(rng.standard_normal((count, 12)) @ mixed) for count in (6, 400, 400))
    wrong = moments(rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12)))
    one, two = network().layers
    assert better_suited([one, two], [few, more], [more, few], [unseen, unseen]) == {one: more}
    assert better_suited([one], [more], [wrong], [unseen]) == {}


def test_channels_without_any_variance_are_no_obstacle():
    flat = moments(np.ones((5, 3)))
    (one, _) = network().layers
    assert better_suited([one], [flat], [flat], [flat]) == {}
