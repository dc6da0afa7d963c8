"""The networks that benchmarks grow: valid, run by ONNX Runtime, the same for a seed, realistic in what they carry."""

import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.conftest import ROOT

BENCHMARKS = str(ROOT / "tests" / "benchmarks")


@pytest.fixture(scope="module")
def load():
    """Import a module as the scripts do, which find each other in their own folder."""
    sys.path.append(BENCHMARKS)
    yield import_module
    sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def networks(load):
    return load("networks")


def shapes(networks):
    decoder = networks.Decoder(layers=2, width=32, hidden=96, heads=4, kv_heads=2, vocabulary=80)
    encoder = networks.Encoder(layers=2, width=32, hidden=128, heads=4, vocabulary=80, positions=16)
    return {
        "decoder": decoder,
        "cached decoder": replace(decoder, cache=True),
        "tied decoder": replace(decoder, kv_heads=4, tied=True),
        "encoder": encoder,
        "decomposed encoder": replace(encoder, decomposed=True),
    }


KINDS = ("decoder", "cached decoder", "tied decoder", "encoder", "decomposed encoder")


def session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def feeds(networks, shape, path, tokens=12):
    networks.samples_of(shape, path, 3, tokens)
    with np.load(path) as stored:
        arrays = dict(stored)
    if getattr(shape, "cache", False):
        empty = np.zeros((3, shape.kv_heads, 0, shape.head_width), np.float32)
        arrays |= {f"past_key_values.{k}.{p}": empty for k in range(shape.layers) for p in ("key", "value")}
    return arrays


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_valid_and_runs(networks, tmp_path, kind, inline):
    shape, path = shapes(networks)[kind], tmp_path / "model.onnx"
    networks.write(shape, path, inline=inline)
    onnx.checker.check_model(str(path), full_check=True)
    assert path.with_name("model.onnx_data").exists() != inline
    arrays = feeds(networks, shape, tmp_path / "calib.npz")
    outputs = session(path).run(None, arrays)
    assert outputs[0].shape == (3, 12, shape.width if "encoder" in kind else shape.vocabulary)
    assert all(np.isfinite(x).all() for x in outputs)
    assert 0.5 < outputs[0].std() < 6
    model = onnx.load(str(path))
    matrices = [t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT]
    assert sum(int(np.prod(t.dims)) for t in matrices) == shape.weights


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_same_seed_gives_the_same_bytes(networks, tmp_path, kind):
    paths = [tmp_path / str(k) / "model.onnx" for k in range(3)]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        path.parent.mkdir()
        networks.write(shapes(networks)[kind], path, seed)
    first, again, other = ([p.read_bytes(), p.with_name("model.onnx_data").read_bytes()] for p in paths)
    assert first == again
    assert first[1] != other[1]


def test_blocks_of_any_size_are_the_same_matrix(load):
    weights = load("random_weights")
    matrix = weights.Matrix("w", (300, 70), 0.1, 0, weights.gains("g", 300, 0))
    whole, parts = (np.concatenate(list(matrix.blocks(size))) for size in (1 << 20, 1000))
    assert whole.dtype == np.float32
    assert whole.tobytes() == parts.tobytes()


def test_weights_look_trained(load):
    weights = load("random_weights")
    (values,) = weights.Matrix("w", (512, 512), 0.05, 0).blocks()
    assert abs(values.std() / 0.05 - 1) < 0.1
    singular = np.linalg.svd(values, compute_uv=False)
    plain = np.linalg.svd(np.random.default_rng(0).normal(0, 0.05, values.shape), compute_uv=False)
    assert singular[0] > 2 * plain[0]
    assert singular[0] > 1.5 * singular[9] > 1.5 * 1.2 * singular[60]
    normal = values / values.std()
    assert np.mean(normal**4) > 4  # a normal variate has 3
    first, second = (np.flatnonzero(weights.gains(name, 512, 0) > 9) for name in ("g", "h"))
    assert first.tolist() == second.tolist()
    assert first.size == 4


def test_inline_bytes_are_what_protobuf_writes(networks, tmp_path):
    path = tmp_path / "model.onnx"
    networks.write(shapes(networks)["decoder"], path, inline=True)
    assert onnx.load(str(path)).SerializeToString(deterministic=True) == path.read_bytes()


def test_a_cached_run_equals_the_whole(networks, tmp_path):
    plain, cached = (shapes(networks)[kind] for kind in ("decoder", "cached decoder"))
    networks.write(plain, tmp_path / "plain.onnx")
    networks.write(cached, tmp_path / "cached.onnx")
    whole = feeds(networks, plain, tmp_path / "calib.npz")
    (expected,) = session(tmp_path / "plain.onnx").run(None, whole)
    stepwise, state = session(tmp_path / "cached.onnx"), feeds(networks, cached, tmp_path / "calib.npz")
    names = [o.name.replace("present", "past_key_values") for o in stepwise.get_outputs()]
    logits = []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        state |= {k: whole[k][:, begin:end] for k in ("input_ids", "position_ids")}
        state["attention_mask"] = whole["attention_mask"][:, :end]
        results = dict(zip(names, stepwise.run(None, state), strict=True))
        logits.append(results.pop("logits"))
        state |= results
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_masked_tokens_change_nothing(networks, tmp_path, kind):
    shape = shapes(networks)[kind]
    networks.write(shape, tmp_path / "model.onnx")
    arrays = feeds(networks, shape, tmp_path / "calib.npz")
    arrays["attention_mask"][:, 8:] = 0
    (before,) = session(tmp_path / "model.onnx").run(None, arrays)
    arrays["input_ids"][:, 8:] = 0
    (after,) = session(tmp_path / "model.onnx").run(None, arrays)
    np.testing.assert_allclose(before[:, :8], after[:, :8], rtol=1e-4, atol=1e-5)
    arrays["attention_mask"][:] = 1
    (open_,) = session(tmp_path / "model.onnx").run(None, arrays)
    assert np.allclose(open_[:, :8], after[:, :8], atol=1e-3) == (kind == "decoder")


def test_samples_follow_zipf_with_repeated_bigrams(networks, tmp_path):
    networks.samples(tmp_path / "calib.npz", 20, 500, 1000, seed=3)
    with np.load(tmp_path / "calib.npz") as stored:
        assert sorted(stored) == ["attention_mask", "input_ids", "position_ids"]
        ids = stored["input_ids"]
        assert all(a.dtype == np.int64 and a.shape == (20, 500) for a in stored.values())
    counts = np.bincount(ids.ravel(), minlength=1000)
    assert ids.max() < 1000
    assert counts[:10].sum() > 5 * counts[100:110].sum() > 0
    pairs = ids[:, :-1] * 1000 + ids[:, 1:]
    shuffled = np.random.default_rng(0).permuted(ids, axis=1)
    expected = shuffled[:, :-1] * 1000 + shuffled[:, 1:]
    assert np.unique(pairs).size < 0.9 * np.unique(expected).size


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_families_have_about_the_weights_asked_for(networks, family):
    for weights in (10_000_000, 40_000_000, 250_000_000, 1_000_000_000):
        shape = networks.named(f"{family}:{weights}")
        assert abs(shape.weights / weights - 1) < 0.1
        assert shape.width % shape.heads == 0
        assert shape.heads % getattr(shape, "kv_heads", 1) == 0


def test_ready_shapes_have_the_sizes_of_their_models(networks):
    sizes = {name: round(networks.named(name).weights / 1e6) for name in ("smollm2", "tinyllama", "minilm")}
    assert sizes == {"smollm2": 163, "tinyllama": 1100, "minilm": 23}


def test_variants_change_only_layers_or_width(load, networks):
    sizes, base = load("shapes"), networks.decoder_of(10_000_000)
    assert sizes.with_layers(base, 9) == replace(base, layers=9)
    wide = sizes.with_width(base, 640)
    assert (wide.layers, wide.vocabulary, wide.width) == (base.layers, base.vocabulary, 640)
    assert wide.weights > 2 * base.weights


def test_exponents_are_fitted_where_there_are_two_sizes(load):
    exponent = load("growth").exponent
    assert exponent([10, 20, 40], [3.0, 12.0, 48.0]) == "2.00"
    assert exponent([10], [3.0]) == exponent([10, 10], [3.0, 4.0]) == exponent([10, 20], [0.0, 4.0]) == ""
