"""Every rule by which samples are accepted, converted or refused."""

import numpy as np
import pytest
from onnx import load

from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import InputSpec, input_specs
from rdoq_onnx.errors import CalibrationError, ModelError
from tests.conftest import ZOO


def spec(name, *shape, dtype="float32"):
    return InputSpec(name, np.dtype(dtype), shape)


X = spec("x", None, 3)
SILERO = (spec("input", None, None), spec("state", 2, None, 4), spec("sr", dtype="int64"))


def floats(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def every(samples):
    return samples.feeds(slice(None))


def refusal(source, *specs, error=CalibrationError):
    with pytest.raises(error) as caught:
        load_samples(source, specs, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_by_name_or_alone(tmp_path):
    x = floats(5, 3)
    np.savez(tmp_path / "a.npz", anything=x, y=np.arange(5))
    np.save(tmp_path / "a.npy", x)
    for source in (tmp_path / "a.npz", str(tmp_path / "a.npy"), {"x": x}, {"input": x.tolist()}):
        samples = load_samples(source, [X], None)
        np.testing.assert_allclose(every(samples)["x"], x)
        assert every(samples)["x"].dtype == np.float32
        assert samples.batch is None
    assert load_samples(str(tmp_path / "a.npz"), [X], None).source == str(tmp_path / "a.npz")
    assert load_samples({"x": x}, [X], None).source == "arrays"


def test_load_takes_y_mean_and_std_where_the_model_has_them():
    given = {"y": floats(5, 3), "mean": floats(5, 2)}
    samples = load_samples(given, [spec("y", None, 3), spec("mean", None, 2)], None)
    assert list(samples.arrays) == ["y", "mean"]
    assert samples.classes is None
    np.testing.assert_array_equal(every(load_samples({"y": floats(5, 3)}, [spec("y", None, 3)], None))["y"], given["y"])


def test_constants_and_batch():
    given = {"input": floats(5, 7), "state": np.zeros((2, 1, 4), np.float32), "sr": np.int64(16000)}
    samples = load_samples(given, SILERO, 3)
    assert set(samples.constants) == {"state", "sr"}
    assert samples.batch == samples.fixed_batch(SILERO) == 1
    assert every(samples)["input"].shape == (3, 7)
    assert every(samples)["state"].shape == (2, 1, 4)
    table = (X, spec("table", 4, 2))
    constant = load_samples({"x": floats(9, 3), "table": floats(4, 2)}, table, None)
    assert (set(constant.constants), constant.batch) == ({"table"}, None)


def test_batch_of_one():
    samples = load_samples({"x": floats(5, 3)}, [spec("x", 1, 3)], None)
    assert samples.batch == 1
    assert [len(b["x"]) for b in samples.batches(4)] == [1] * 5
    assert len(load_samples({"x": floats(1, 3)}, [spec("x", 1, 3)], None)) == 1


def test_fixed_batch():
    specs = [spec("x", 4, 3)]
    samples = load_samples({"x": floats(12, 3)}, specs, None)
    assert (samples.batch, samples.fixed_batch(specs)) == (4, 4)
    assert [len(b["x"]) for b in samples.batches(1)] == [4, 4, 4]
    assert [len(part) for part in samples.split(0.5, 0)] == [8, 4]
    assert len(load_samples({"x": floats(12, 3)}, specs, 9)) == 8
    assert len(load_samples({"x": floats(12, 3)}, specs, 2)) == 4
    message = refusal({"x": floats(10, 3)}, *specs)
    assert "10 samples" in message
    assert "takes 4" in message


def test_limit_spaces_evenly():
    x = floats(10, 3)
    picked = every(load_samples({"x": x}, [X], 4))["x"]
    np.testing.assert_array_equal(picked, x[[0, 3, 6, 9]])
    assert len(load_samples({"x": x}, [X], 99)) == 10


def images():
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(0, 256, (3, 4, 5, 3), np.uint8),
        "mean": np.array([0.4, 0.5, 0.6], np.float32),
        "std": np.array([0.2, 0.3, 0.4]),
    }


def test_images_are_normalized():
    data = images()
    got = every(load_samples(data, [spec("input", None, 3, 4, 5)], None))["input"]
    expected = ((data["x"].astype(np.float32) / 255 - data["mean"]) / data["std"]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got.flags.c_contiguous
    kept = every(load_samples(data, [spec("input", None, 4, 5, 3, dtype="uint8")], None))["input"]
    np.testing.assert_array_equal(kept, data["x"])


def test_images_refused():
    data = images()
    wants = spec("input", None, 3, 4, 5)
    message = refusal({"x": data["x"]}, wants)
    assert "'input' has shape [3,4,5,3]" in message
    assert "--image-mean" in refusal({"x": data["x"].transpose(0, 3, 1, 2)}, wants)
    assert "3 channels, mean (--image-mean) has 2 numbers" in refusal(data | {"mean": np.zeros(2)}, wants)
    assert "NaN or infinity" in refusal(data | {"std": np.zeros(3)}, wants)
    assert "[?,3,9,9]" in refusal(data, spec("input", None, 3, 9, 9))


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("float64", "float32"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("float32", "float64"),
        (">f4", "float32"),
        ("int64", "int32"),
        ("uint8", "int64"),
        ("int64", "uint8"),
        ("bool", "bool"),
    ],
)
def test_dtypes_converted(found, wanted):
    array = np.array([[0, 1, 1]]).astype(found)
    got = every(load_samples({"x": array}, [spec("x", None, 3, dtype=wanted)], None))["x"]
    assert got.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
    ("array", "wanted", "said"),
    [
        (np.array([[1e300]]), "float32", "too large for the input's float32"),
        (np.array([[1e6]], np.float32), "float16", "too large for the input's float16"),
        (np.array([[-1]]), "uint8", "-1 to 0, too wide for the input's uint8"),
        (np.array([[2**63]], np.uint64), "int64", f"0 to {2**63}, too wide"),
        (np.array([[1]]), "float32", "is int64, but the model expects float32"),
        (np.array([[1.0]]), "int64", "is float64, but the model expects int64"),
        (np.array([[True]]), "int64", "is bool, but the model expects int64"),
        (np.array([["a"]]), "float32", "is <U1, but the model expects float32"),
        (np.array([[np.nan]]), "float64", "NaN or infinity"),
        (np.array([[np.inf]]), "float32", "NaN or infinity"),
    ],
)
def test_dtypes_and_values_refused(array, wanted, said):
    message = refusal({"x": array}, spec("x", None, 1, dtype=wanted))
    assert message.startswith("arrays: 'x' ")
    assert said in message


def test_infinity_in_a_mask_says_what_to_use_instead():
    assert "-1e4 if it is a mask" in refusal({"x": np.array([[0, -np.inf, 0]])}, X)
    assert "mask" not in refusal({"x": np.array([[0, np.nan, np.inf]])}, X)


def test_shapes_refused():
    assert "'x' has shape [3], but the model expects [?,3]" in refusal({"x": floats(3)}, X)
    assert "'x' has shape [5,4], but the model expects [?,3]" in refusal({"x": floats(5, 4)}, X)
    assert "'x' holds no samples" in refusal({"x": floats(0, 3)}, X)
    assert "'x' is ragged" in refusal({"x": [[1.0], [1.0, 2.0]]}, X)
    message = refusal({"x": floats(5, 3), "z": floats(4, 3)}, X, spec("z", None, 3))
    assert "('x', 5), ('z', 4)" in message
    assert "no input with samples" in refusal({"sr": np.int64(1)}, spec("sr", dtype="int64"), error=ModelError)


def test_names_refused():
    message = refusal({"tokens": floats(5, 3), "mask": floats(5, 3), "y": floats(5)}, spec("token", None, 3), X)
    assert "no array for input 'token'; rename 'tokens'" in message
    assert "inputs: 'token', 'x'" in message
    assert "arrays: 'tokens', 'mask', 'y'" in message
    assert "arrays: none" in refusal({}, X)
    assert "no array for input 'x'" in refusal({"y": floats(5, 3)}, X)
    assert "array 'foo' is not an input of the model" in refusal({"x": floats(5, 3), "foo": floats(5, 3)}, X)
    assert list(load_samples({"x": floats(5, 3), "y": floats(1), "mean": 0, "std": 1}, [X], None).arrays) == ["x"]


def test_path_errors_name_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", x=floats(5, 4))
    assert refusal(tmp_path / "a.npz", X).startswith(f"{tmp_path / 'a.npz'}: 'x'")
    assert refusal(tmp_path / "none.npz", X).startswith(f"{tmp_path / 'none.npz'}: ")


@pytest.mark.parametrize("name", ["basic_pitch", "cifar10", "magika", "orientation", "ppocr_cls", "ppocr_det"])
@pytest.mark.parametrize("part", ["calib", "test"])
def test_zoo(name, part):
    if not ZOO.is_dir():
        pytest.skip(f"no zoo of real models at {ZOO}")
    model = load(next((ZOO / name).glob("*.onnx")))
    specs = input_specs(model)
    samples = load_samples(ZOO / name / f"{part}.npz", specs, 4)
    assert len(samples) == 4
    assert [every(samples)[s.name].dtype for s in specs] == [s.dtype for s in specs]


def test_zoo_silero():
    if not ZOO.is_dir():
        pytest.skip(f"no zoo of real models at {ZOO}")
    specs = input_specs(load(ZOO / "silero_vad" / "model.onnx"))
    given = {"input": floats(4, 576), "state": np.zeros((2, 1, 128), np.float32), "sr": np.int64(16000)}
    samples = load_samples(given, specs, None)
    assert (set(samples.constants), samples.batch) == ({"state", "sr"}, 1)


def test_integers_under_y_are_classes():
    x = {"x": floats(6, 3)}
    samples = load_samples(x | {"y": np.arange(6, dtype=np.uint8)}, [X], 3)
    assert samples.classes.tolist() == [0, 2, 5]
    assert samples.classes.dtype == np.int64
    for other in (floats(6), np.arange(5), np.zeros((6, 2), np.int64)):
        assert load_samples(x | {"y": other}, [X], None).classes is None
