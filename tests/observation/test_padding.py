"""Padding is cut off where the model says that it has no effect, and nowhere else."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.config import Config
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.observation.padding import presumably_unpadded, unpadded
from rdoq_onnx.system.io import read_model
from rdoq_onnx.system.runtime import Runtime
from tests.conftest import ROOT, load_plays

RUNTIME = Runtime("cpu", 2)
LENGTH = 9
LENGTHS = (3, 9, 5, 3, 7, 5)


def attention(mask="mask", kept="f", length="T"):
    """A layer of attention over an embedding; `kept` is 1 where a key counts."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (int64[N, {length}] ids, int64[N, {length}] {mask}) => (float[N, {length}, 4] y, float[N, 4] first)
    <float one = {{1}}, float far = {{-1e4}}, int64[1] axis = {{1}}, int64 zero = {{0}}> {{
        e = Gather (emb, ids) k = MatMul (e, w) t = Transpose <perm = [0, 2, 1]> (e) s = MatMul (k, t)
        f = Cast <to = 1> ({mask}) h = Max (f, one) o = Sub (one, f) g = Sub (one, {kept}) b = Mul (g, far)
        u = Unsqueeze (b, axis) a = Add (s, u) p = Softmax (a) v = MatMul (p, e) y = MatMul (v, x)
        first = Gather <axis = 1> (y, zero)
    }}""")
    rng = np.random.default_rng(0)
    arrays = {"emb": (20, 6), "w": (6, 6), "x": (6, 4)}
    arrays = {k: rng.standard_normal(shape, np.float32) for k, shape in arrays.items()}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    return model


def padded(mask="mask", left=False, kept=1):
    rng = np.random.default_rng(1)
    ids, masks = np.zeros((len(LENGTHS), LENGTH), np.int64), np.full((len(LENGTHS), LENGTH), 1 - kept)
    for row, length in enumerate(LENGTHS):
        part = slice(LENGTH - length, LENGTH) if left else slice(0, length)
        ids[row, part] = rng.integers(1, 20, length)
        masks[row, part] = kept
    return {"ids": ids, mask: masks}


def cut(model, arrays):
    return unpadded(model, samples_for(model, arrays, Config()), RUNTIME)


def test_samples_are_cut_to_what_the_mask_keeps():
    arrays = padded()
    found = cut(attention(), arrays)
    shapes = [part.feeds(slice(None)) for part in found.by_shape()]
    assert [f["ids"].shape for f in shapes] == [(2, 3), (2, 5), (1, 7), (1, 9)]
    assert all((f["mask"] == 1).all() for f in shapes)
    np.testing.assert_array_equal(shapes[0]["ids"], arrays["ids"][[0, 3], :3])
    assert found.digest != samples_for(attention(), arrays, Config()).digest


def test_an_input_that_may_be_a_mask_is_presumed_to_be_one():
    samples = samples_for(attention(), padded(), Config())
    found, expected = presumably_unpadded(attention(), samples), unpadded(attention(), samples, RUNTIME)
    assert found.digest == expected.digest
    whole = samples_for(attention(), padded() | {"mask": np.ones((len(LENGTHS), LENGTH), np.int64)}, Config())
    assert presumably_unpadded(attention(), whole) is whole


def test_a_mask_of_what_to_leave_out():
    found = cut(attention(kept="o"), padded(kept=0))
    assert [len(part) for part in found.by_shape()] == [2, 2, 1, 1]
    assert all((part.feeds(slice(None))["mask"] == 0).all() for part in found.by_shape())


UNCUT = {
    "the first position of an output is padding": (attention(), padded(left=True)),
    "a fixed length": (attention(length=str(LENGTH)), padded()),
    "zeros that count": (attention(kept="h"), padded()),
    "segments": (attention(mask="token_type_ids"), padded("token_type_ids")),
    "nothing but ones": (attention(), padded() | {"mask": np.ones((len(LENGTHS), LENGTH), np.int64)}),
    "more than zeros and ones": (attention(), padded() | {"mask": 2 * padded()["mask"]}),
    "nothing but zeros": (attention(), padded() | {"mask": np.zeros((len(LENGTHS), LENGTH), np.int64)}),
}


@pytest.mark.parametrize("kind", UNCUT)
def test_samples_stay_whole(kind):
    model, arrays = UNCUT[kind]
    samples = samples_for(model, arrays, Config())
    assert unpadded(model, samples, RUNTIME) is samples


def test_classes_stay_with_their_samples():
    samples = samples_for(attention(), padded() | {"y": np.arange(len(LENGTHS))}, Config())
    found = unpadded(attention(), samples, RUNTIME)
    for part in found.by_shape():
        for index, label in enumerate(part.classes):
            assert part.feeds([index])["ids"].shape[1] == LENGTHS[label]


def test_what_stands_in_the_padding_does_not_matter():
    """A run on padded samples is one on samples of different lengths."""
    arrays = {k: np.concatenate([v] * 4) for k, v in padded().items()}
    arrays["ids"] = np.where(arrays["mask"] == 1, (arrays["ids"] + np.arange(24)[:, None]) % 19 + 1, 0)
    feeds = [
        {k: v[None, :n] for k, v in zip(arrays, row, strict=True)}
        for n in sorted(set(LENGTHS))
        for row in zip(*arrays.values(), strict=True)
        if row[1].sum() == n
    ]
    runs = [rdoq_onnx.quantize(attention(), given, bits=6, effort="fast", threads=2) for given in (arrays, feeds)]
    assert runs[0].model.SerializeToString() == runs[1].model.SerializeToString()


@pytest.mark.parametrize("left", [False, True])
def test_a_decoder_whose_mask_also_counts_cached_tokens(left):
    """The mask is [batch, total_sequence], tokens [batch, sequence]; the caches are empty."""
    model = read_model(ROOT / "models" / "plays_decoder_cached.onnx")
    tokens, mask = load_plays("calib")[:3, :9], np.ones((3, 9), np.int64)
    for row, padding in ((1, 4), (2, 2)):
        mask[row, slice(padding) if left else slice(9 - padding, 9)] = 0
    found = cut(model, {"input_ids": tokens, "attention_mask": mask})
    shapes = {f["input_ids"].shape[1]: f for f in (part.feeds(slice(None)) for part in found.by_shape())}
    assert sorted(shapes) == [5, 7, 9]
    for length, feeds in shapes.items():
        assert feeds["attention_mask"].tolist() == [[1] * length]
        assert feeds["position_ids"].tolist() == [[*range(length)]]
        assert feeds["past_key_values.0.key"].shape == (1, 2, 0, 16)
