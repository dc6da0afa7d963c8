"""Calibration folders: images, arrays, tensors; misfits are refused by file name."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.pixels import DEFAULT_PIXELS, Pixels
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.errors import CalibrationError

RNG = np.random.default_rng(0)


def spec(name, *shape, dtype="float32"):
    return InputSpec(name, np.dtype(dtype), shape)


NCHW = spec("x", None, 3, 16, 24)
X = spec("x", None, 3)


def loaded(source, *specs, limit=None, pixels=DEFAULT_PIXELS):
    return load_samples(source, specs, limit, pixels).feeds(slice(None))


def refusal(source, *specs, pixels=DEFAULT_PIXELS):
    with pytest.raises(CalibrationError) as caught:
        load_samples(source, specs, None, pixels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(path, height=16, width=24, mode="RGB", **options):
    """Noise, which lossless formats preserve exactly."""
    path.parent.mkdir(exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = RNG.integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels, mode).save(path, **options)
    return pixels


def test_images(tmp_path):
    made = [picture(tmp_path / name) for name in ("b.png", "a.bmp")]
    made.append(picture(tmp_path / "class" / "c.PNG"))
    (tmp_path / "labels.csv").write_text("a,1\n")
    (tmp_path / ".hidden.png").write_text("no image")
    pixels = np.stack([made[1], made[0], made[2]]).astype(np.float64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    got = loaded(tmp_path, NCHW)["x"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(loaded(tmp_path, spec("x", None, 16, 24, 3))["x"], got.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(loaded(tmp_path, spec("x", None, 16, 24, 3, dtype="uint8"))["x"], pixels)
    given = loaded(tmp_path, spec("x", None, 3, 16, 24, dtype="uint8"))["x"]
    np.testing.assert_array_equal(given, pixels.transpose(0, 3, 1, 2))


def test_images_with_their_own_normalization(tmp_path):
    pixels = picture(tmp_path / "a.png").transpose(2, 0, 1)[None].astype(np.float64)
    raw = loaded(tmp_path, NCHW, pixels=Pixels(1.0, (0.0,), (1.0,)))["x"]
    np.testing.assert_array_equal(raw, pixels)
    own = loaded(tmp_path, NCHW, pixels=Pixels(mean=(1, 2, 3), std=(2,)))["x"]
    np.testing.assert_allclose(own, (pixels / 255 - np.array([1, 2, 3]).reshape(3, 1, 1)) / 2, rtol=1e-5)
    half = loaded(tmp_path, NCHW, pixels=Pixels(scale=1 / 127.5, mean=(1.0,), std=(1.0,)))["x"]
    np.testing.assert_allclose(half, pixels / 127.5 - 1, atol=1e-6)
    assert "3 channels, std (--image-std) has 2 numbers" in refusal(tmp_path, NCHW, pixels=Pixels(std=(1, 2)))


def test_pixels_also_normalize_bytes_in_a_file(tmp_path):
    x = RNG.integers(0, 256, (5, 16, 24, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, mean=np.full(3, 0.5), std=np.full(3, 0.25))
    got = loaded(tmp_path / "a.npz", NCHW)["x"]
    np.testing.assert_allclose(got, (x.transpose(0, 3, 1, 2) / 255 - 0.5) * 4, atol=1e-5)
    got = loaded(tmp_path / "a.npz", NCHW, pixels=Pixels(mean=(0.0,)))["x"]
    np.testing.assert_allclose(got, x.transpose(0, 3, 1, 2) / 255 * 4, atol=1e-5)
    assert "do not apply" in refusal({"x": np.zeros((2, 3), np.float32)}, X, pixels=Pixels(mean=(0.0,)))


def test_gray_images(tmp_path):
    pixels = picture(tmp_path / "a.png", mode="L")
    got = loaded(tmp_path, spec("x", None, 1, 16, 24))["x"]
    np.testing.assert_allclose(got, pixels[None, None] / 255, rtol=1e-6)


def test_other_sizes_are_scaled_and_cropped(tmp_path):
    """The middle of a wide image of three stripes, whose outer ones are cropped."""
    stripes = np.zeros((32, 96, 3), np.uint8)
    stripes[:, 20:76] = 200
    Image.fromarray(stripes).save(tmp_path / "a.png")
    got = loaded(tmp_path, spec("x", None, 3, 16, 24), pixels=Pixels(1.0, (0.0,), (1.0,)))["x"]
    np.testing.assert_array_equal(got, np.full((1, 3, 16, 24), 200))


def test_free_sizes_take_those_of_the_first_image(tmp_path):
    picture(tmp_path / "a.png", 10, 20)
    picture(tmp_path / "b.png", 40, 40)
    assert loaded(tmp_path, spec("x", None, 3, None, None))["x"].shape == (2, 3, 10, 20)
    assert loaded(tmp_path, spec("x", None, None, 12, 3))["x"].shape == (2, 10, 12, 3)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture(tmp_path / "a.png", 24, 16, exif=exif)
    assert loaded(tmp_path, spec("x", None, 3, None, None))["x"].shape == (1, 3, 16, 24)


def test_a_limit_spaces_images_evenly_and_opens_no_others(tmp_path):
    made = [picture(tmp_path / f"{k:02}.png") for k in range(10)]
    for k in (1, 2, 4):
        (tmp_path / f"{k:02}.png").write_text("no image")
    got = loaded(tmp_path, NCHW, limit=4, pixels=Pixels(1.0, (0.0,), (1.0,)))["x"]
    np.testing.assert_array_equal(got, np.stack([made[k] for k in (0, 3, 6, 9)]).transpose(0, 3, 1, 2))
    assert len(loaded(tmp_path, spec("x", 2, 3, 16, 24), limit=3)["x"]) == 2


def test_broken_images_are_named(tmp_path):
    picture(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for broken in (b"", b"hello", data[:200]):
        (tmp_path / "b.png").write_bytes(broken)
        assert refusal(tmp_path, NCHW).startswith(f"{tmp_path / 'b.png'}: Pillow cannot read the image")


def test_images_for_a_model_that_takes_none(tmp_path):
    picture(tmp_path / "a.png")
    assert "'x' [None, 3]" in refusal(tmp_path, X)
    assert "contains images" in refusal(tmp_path, NCHW, spec("z", None, 3))


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_array_files(tmp_path, ending):
    x = RNG.standard_normal((6, 3)).astype(np.float32)
    for name, part in (("b", x[2:5]), ("a", x[:2]), ("c", x[5])):
        if ending == "npy":
            np.save(tmp_path / name, part)
        else:
            np.savez(tmp_path / name, x=part, scale=np.float32(2))
    specs = [X] if ending == "npy" else [X, spec("scale")]
    got = loaded(tmp_path, *specs)
    np.testing.assert_array_equal(got["x"], x)
    if ending == "npz":
        assert got["scale"] == 2
    np.testing.assert_array_equal(loaded(tmp_path, *specs, limit=3)["x"], x[[0, 2, 5]])
    np.save(tmp_path / "d.npy", np.zeros((2, 4), np.float32))
    assert "d.npy" in refusal(tmp_path, *specs)


def test_large_array_files(tmp_path):
    x = RNG.standard_normal((200, 3, 1000)).astype(np.float32)
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", x[100 * k : 100 * k + 100])
    np.testing.assert_array_equal(loaded(tmp_path, spec("x", None, 3, 1000))["x"], x)


def test_image_arrays_with_their_normalization(tmp_path):
    x = RNG.integers(0, 256, (4, 16, 24, 3), np.uint8)
    half = np.full(3, 0.5)
    for k in range(2):
        np.savez(tmp_path / f"{k}.npz", x=x[2 * k : 2 * k + 2], mean=half, std=half, y=np.arange(2))
    np.testing.assert_allclose(loaded(tmp_path, NCHW)["x"], x.transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)


def test_onnx_test_data(tmp_path):
    x, z = RNG.standard_normal((2, 3, 3)).astype(np.float32), RNG.integers(0, 9, (3, 2))
    for k in range(3):
        folder = tmp_path / f"test_data_set_{k}"
        folder.mkdir()
        onnx.save_tensor(numpy_helper.from_array(x[0, k : k + 1]), folder / "input_0.pb")
        onnx.save_tensor(numpy_helper.from_array(z[k : k + 1]), folder / "input_1.pb")
        onnx.save_tensor(numpy_helper.from_array(x[1, k : k + 1]), folder / "output_0.pb")
    specs = (X, spec("z", None, 2, dtype="int64"))
    got = loaded(tmp_path, *specs)
    np.testing.assert_array_equal(got["x"], x[0])
    np.testing.assert_array_equal(got["z"], z)
    assert len(loaded(tmp_path / "test_data_set_1", *specs)["x"]) == 1
    assert "the last input of the model is input_0" in refusal(tmp_path, X)
    (tmp_path / "test_data_set_2" / "input_1.pb").write_bytes(b"\xff\xff")
    assert refusal(tmp_path, *specs).startswith(f"{tmp_path / 'test_data_set_2' / 'input_1.pb'}: is not an ONNX tensor")
    (tmp_path / "test_data_set_2" / "input_1.pb").unlink()
    assert "test_data_set_2 has arrays 'x', test_data_set_0 has 'x', 'z'" in refusal(tmp_path, *specs)


def test_folders_without_usable_samples(tmp_path):
    assert "contains no images" in refusal(tmp_path, X)
    (tmp_path / "a.pb").touch()
    assert "no input_0.pb" in refusal(tmp_path, X)
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    assert "arrays (.npy, .npz) and tensors (.pb)" in refusal(tmp_path, X)
