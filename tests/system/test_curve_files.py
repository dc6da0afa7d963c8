"""What --curves and --shard name: a checkpoint, a shard's part, or the parts of all shards."""

from pathlib import Path

import pytest

from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system.curve_files import CurveFiles, parse_shard


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in (1, 2, 10):
        Path(f"part{k}.npz").touch()
    Path("part3.npz.data").mkdir()
    return tmp_path


def test_a_path_is_a_checkpoint():
    assert CurveFiles.of(None) == CurveFiles()
    assert CurveFiles.of("c.npz") == CurveFiles(Path("c.npz"))
    assert CurveFiles.of(CurveFiles(Path("c.npz"))) == CurveFiles(Path("c.npz"))


def test_a_pattern_is_all_files_that_match(folder):
    parts = [Path(f"part{k}.npz") for k in (1, 10, 2)]
    assert CurveFiles.of("part*.npz") == CurveFiles(None, tuple(parts))
    assert CurveFiles.of("part*") == CurveFiles(None, tuple(parts))
    assert CurveFiles.of(folder / "part[12].npz").parts == (folder / "part1.npz", folder / "part2.npz")
    Path("odd[1].npz").touch()
    assert CurveFiles.of("odd[1].npz") == CurveFiles(Path("odd[1].npz"))
    with pytest.raises(ConfigError, match=r"--curves 'other\*': no file matches"):
        CurveFiles.of("other*")


def test_a_shard_writes_its_own_file_and_reads_the_others(folder):
    assert CurveFiles.of("x.npz", (3, 4)) == CurveFiles(Path("x.npz"), (), (3, 4))
    assert CurveFiles.of("part*.npz", (2, 10)) == CurveFiles(
        Path("part2.npz"), (Path("part1.npz"), Path("part10.npz")), (2, 10)
    )
    assert CurveFiles.of("part*.npz", (2, 2)).parts == (Path("part1.npz"),)
    for curves in ("part**.npz", "part?.npz", "p[1]*.npz"):
        with pytest.raises(ConfigError, match="one \\* stands for the shard's number"):
            CurveFiles.of(curves, (1, 2))
    with pytest.raises(ConfigError, match="--shard needs a file"):
        CurveFiles.of(None, (1, 2))


def test_what_is_no_path():
    with pytest.raises(ConfigError, match="curves is a int; give a path"):
        CurveFiles.of(5)


def test_shards_are_numbered_from_one():
    assert parse_shard(" 3/16") == (3, 16)
    for text in ("0/3", "4/3", "3", "3/", "a/b", "-1/3", "1/0", "1e2/3"):
        with pytest.raises(ConfigError, match="such as 3/16"):
            parse_shard(text)
