"""A run that ends badly loses nothing. Real processes; models in one file, and with external data."""

import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.errors import OutputError
from rdoq_onnx.system import io

FORMS = {"one file": io.LIMIT, "data beside it": 1000}  # bytes from which tensors go to external data
WRITER = """
import resource, signal, sys
import onnx
from rdoq_onnx.errors import OutputError
from rdoq_onnx.system import io
target, limit, largest, times, *sources = sys.argv[1:]
io.LIMIT = int(limit)
models = [onnx.load(s) for s in sources]
if int(largest):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest),) * 2)
print("begun", flush=True)
for k in range(int(times)):
    try:
        io.write_model(models[k % len(models)], target)
    except OutputError as error:
        sys.exit(f"{error}")
"""


@pytest.fixture
def sources(tmp_path_factory):
    """Three models with 2 MB of weights each, in files."""
    folder, paths = tmp_path_factory.mktemp("sources"), []
    for k in range(3):
        model = parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[N, 500] x) => (float[N, 1000] y) { y = MatMul (x, w) }'
        )
        model.graph.initializer.append(numpy_helper.from_array(np.full((500, 1000), k, np.float32), "w"))
        paths.append(folder / f"{k}.onnx")
        onnx.save(model, paths[-1])
    return paths


@pytest.fixture(params=FORMS)
def limit(request, monkeypatch):
    monkeypatch.setattr(io, "LIMIT", FORMS[request.param])
    return FORMS[request.param]


def writer(target, limit, *sources, times=1, largest=0):
    command = [sys.executable, "-c", WRITER, *map(str, (target, limit, largest, times, *sources))]
    elsewhere = sources[0].parent  # in the repository's root, the source would shadow the package
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=elsewhere)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_full_disk(tmp_path, limit, sources):
    """Simulated by a limit on file sizes, at which a write fails halfway."""
    target = tmp_path / "out.onnx"
    io.write_model(io.read_model(sources[0]), target)
    before = files(tmp_path)
    with writer(target, limit, sources[1], largest=1_000_000) as process:
        _, said = process.communicate()
    assert process.returncode == 1
    assert said == f"{target}: cannot be written (File too large); choose another path\n"
    assert files(tmp_path) == before


def test_killed(tmp_path, limit, sources):
    target = tmp_path / "out.onnx"
    models = [io.read_model(s) for s in sources]
    io.write_model(models[2], target)
    for k in range(4):
        with writer(target, limit, *sources[:2], times=1_000_000) as process:
            time.sleep(0.02 + 0.013 * k)
            process.send_signal(signal.SIGKILL)
        assert io.read_model(target) in models


def test_two_at_a_time(tmp_path, limit, sources):
    target = tmp_path / "out.onnx"
    models = [io.read_model(s) for s in sources]
    with writer(target, limit, *sources[:2], times=20) as one, writer(target, limit, *sources[1:], times=20) as other:
        while one.poll() is None or other.poll() is None:
            if target.exists() and limit == FORMS["one file"]:
                assert io.read_model(target) in models
        assert (one.stderr.read(), other.stderr.read()) == ("", "")
    assert io.read_model(target) in models
    (data, *more) = [p for p in tmp_path.iterdir() if p != target] or [None]
    assert not more
    assert (data is None) == (limit == FORMS["one file"])


def test_the_data_of_a_renamed_model_stays(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(io, "LIMIT", FORMS["data beside it"])
    first, second, _ = (io.read_model(s) for s in sources)
    io.write_model(first, tmp_path / "out.onnx")
    (tmp_path / "out.onnx").rename(tmp_path / "kept.onnx")
    io.write_model(second, tmp_path / "out.onnx")
    assert io.read_model(tmp_path / "kept.onnx") == first
    assert io.read_model(tmp_path / "out.onnx") == second


def test_no_model_is_paired_with_the_data_of_another(tmp_path, monkeypatch, sources):
    """The rename of the model fails after that of its data."""
    monkeypatch.setattr(io, "LIMIT", FORMS["data beside it"])
    first, second, _ = (io.read_model(s) for s in sources)
    target = tmp_path / "out.onnx"
    io.write_model(first, target)

    replace = type(target).replace

    def fail(temporary, to):
        if to == target:
            raise OSError(28, "No space left on device")
        replace(temporary, to)

    monkeypatch.setattr(type(target), "replace", fail)
    with pytest.raises(OutputError, match="No space left"):
        io.write_model(second, target)
    assert io.read_model(target) == first
