"""The scratch folder: when it is made and removed, and what a run that is killed leaves in it."""

import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from rdoq_onnx.errors import ConfigError, OutputError
from rdoq_onnx.model.external import Place, place, values
from rdoq_onnx.system import scratch as scratch_module
from rdoq_onnx.system.scratch import Scratch

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_temporary_folder_goes_with_the_last_object_that_uses_it(tmp_path):
    scratch = Scratch(tmp_path)
    assert not list(tmp_path.iterdir())
    scratch.put("a", ARRAY)
    shelf = scratch.shelf
    shelf.put(TensorProto(), ARRAY)
    (folder,) = tmp_path.iterdir()
    assert scratch.bytes() == sum(p.stat().st_size for p in folder.iterdir())
    del scratch
    gc.collect()
    assert folder.exists()  # the shelf uses it
    del shelf
    gc.collect()
    assert not folder.exists()


def test_without_a_parent_it_is_in_the_folder_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Scratch().folder.parent == tmp_path


def test_arrays_by_name(tmp_path):
    scratch = Scratch(tmp_path)
    assert not scratch.has("a")
    found = scratch.moved("a", ARRAY)
    np.testing.assert_array_equal(found, ARRAY)
    assert not found.flags.writeable
    scratch.put("a", ARRAY + 1)
    np.testing.assert_array_equal(scratch.get("a"), ARRAY + 1)
    scratch.put("b", ARRAY)
    scratch.drop("a", "b", "c")
    assert not scratch.has("a")
    assert not scratch.has("b")


def beside(tmp_path, identity="one"):
    scratch = Scratch(None, tmp_path / "c.curves")
    scratch.bind(identity)
    return scratch


def test_beside_a_checkpoint_it_stays(tmp_path):
    scratch = beside(tmp_path)
    assert not list(tmp_path.iterdir())
    scratch.put("a", ARRAY)
    del scratch
    gc.collect()
    assert (tmp_path / "c.curves.data").is_dir()
    np.testing.assert_array_equal(beside(tmp_path).get("a"), ARRAY)


def test_another_identity_empties_it(tmp_path):
    first = beside(tmp_path)
    first.put("a", ARRAY)
    first.shelf.put(TensorProto(), ARRAY)
    (first.folder / "b.part").touch()
    (first.folder / "mine.txt").touch()
    second = Scratch(None, tmp_path / "c.curves")
    kept = second.shelf.put(TensorProto(), ARRAY + 1)  # a model is read before its identity is known
    second.bind("two")
    assert not second.has("a")
    names = sorted(p.name for p in second.folder.iterdir())
    assert names == sorted([Path(kept.external_data[0].value).name, "identity", "mine.txt"])
    second.put("a", ARRAY)
    assert beside(tmp_path, "two").has("a")
    assert not beside(tmp_path, "one").has("a")


def test_a_folder_of_unknown_identity_is_emptied(tmp_path):
    beside(tmp_path).put("a", ARRAY)
    (tmp_path / "c.curves.data" / "identity").unlink()
    assert not beside(tmp_path).has("a")


def test_an_array_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    scratch = Scratch(tmp_path)
    scratch.put("a", ARRAY)

    def halfway(file, array, allow_pickle):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", halfway)
    for name in ("a", "b"):
        with pytest.raises(OutputError, match=rf"{name}\.npy: cannot be written \(.*\); give --scratch") as caught:
            scratch.put(name, ARRAY + 1)
        assert "\n" not in str(caught.value)
    assert [p.name for p in scratch.folder.iterdir()] == ["a.npy"]
    np.testing.assert_array_equal(scratch.get("a"), ARRAY)


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    for scratch in (Scratch(tmp_path / "file"), Scratch(tmp_path / "none"), Scratch(None, tmp_path / "file" / "c")):
        with pytest.raises(OutputError, match=r"no scratch folder can be made \(.*\); give --scratch") as caught:
            scratch.put("a", ARRAY)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def kept(scratch, outside):
    """Return a model with one tensor on the shelf and one in the file `outside`."""
    model = ModelProto()
    scratch.shelf.put(model.graph.initializer.add(name="a", data_type=1, dims=[2, 3]), ARRAY)
    outside.write_bytes(ARRAY.tobytes())
    place(model.graph.initializer.add(name="b", data_type=1, dims=[2, 3]), Place(str(outside), 0, ARRAY.nbytes))
    return model


def test_a_kept_model_is_found_after_a_move(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    model = kept(beside(tmp_path / "old"), tmp_path / "old" / "b.bin")
    assert beside(tmp_path / "old").located(model, model) == model
    source = ModelProto()
    source.CopyFrom(model)
    (tmp_path / "old" / "b.bin").rename(tmp_path / "new" / "b.bin")
    (tmp_path / "old" / "c.curves.data").rename(tmp_path / "new" / "c.curves.data")
    place(source.graph.initializer[1], Place(str(tmp_path / "new" / "b.bin"), 0, ARRAY.nbytes))
    found = beside(tmp_path / "new").located(model, source)
    for tensor in found.graph.initializer:
        assert tensor.external_data[0].value.startswith(str(tmp_path / "new"))
        np.testing.assert_array_equal(values(tensor), ARRAY)
    assert Scratch(tmp_path / "old").located(ModelProto(), source) == ModelProto()


@pytest.mark.parametrize("path", ["/etc/passwd", "gone.weights", "short.weights"])
def test_a_kept_model_whose_tensors_are_not_there(tmp_path, path):
    scratch = beside(tmp_path)
    (scratch.folder / "short.weights").write_bytes(bytes(5))
    model = kept(scratch, tmp_path / "b.bin")
    place(model.graph.initializer[0], Place(path, 0, ARRAY.nbytes))
    with pytest.raises(ConfigError, match=r"c\.curves: its folder .*c\.curves\.data is incomplete; delete both"):
        scratch.located(model, ModelProto(graph={"initializer": [model.graph.initializer[1]]}))


def test_large_sums_wait_in_files_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_module, "PARKED", 1 << 18)
    scratch, large, small = Scratch(tmp_path), np.asfortranarray(np.arange(65536.0).reshape(-1, 4)), np.arange(3)
    value = (5, None, {"large": large, "small": small}, "text")
    number, nothing, arrays, text = scratch.park(value)
    assert (number, nothing, text) == (5, None, "text")
    assert arrays["small"] is small
    np.testing.assert_array_equal(arrays["large"], large)
    assert not arrays["large"].flags.writeable
    assert not list(scratch.folder.iterdir())
    assert scratch.park(value[2:])[0]["large"] is not large
    monkeypatch.setattr(scratch_module, "PARKED", 1 << 30)
    assert scratch.park(value) is value
