"""Sums computed by the processes of a real Ray: the same bytes, a killed process, errors that name the process."""

import contextlib
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import rdoq_onnx
from rdoq_onnx.calibration.blocks import in_blocks
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.cluster.ray_cluster import computing
from rdoq_onnx.cluster.shipping import RUN, remove_copies
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ClusterError, ConfigError, ShortageError
from rdoq_onnx.model import external
from rdoq_onnx.model.external import Shelf, values
from rdoq_onnx.pipeline import Job
from rdoq_onnx.system.progress import Progress, Unfinished
from rdoq_onnx.system.summation import Sum, Summation, here
from tests.conftest import ROOT
from tests.curves.test_shards import small_or_large

MODEL, CALIBRATION = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: the extra [ray]")
SAMPLES = Samples("test", {"x": np.random.default_rng(0).standard_normal((40, 6), np.float32)})


@pytest.fixture(scope="module")
def compute():
    with computing("2", 1) as compute:
        ray = compute.__self__.ray  # which starts it
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its processes cannot import the tests
        yield compute


def work_of(function):
    """Return the work that applies `function`."""

    @dataclass(frozen=True)
    class Applied:
        def loaded(self):
            return lambda block: function(block)

    return Applied()


def asked(function, batch=3):
    return Sum.of("a sum", work_of(function), in_blocks(SAMPLES, batch))


def total(compute, wanted):
    done = []
    return Summation(compute).total(wanted, done.append, Unfinished()), sum(done)


def moments(block):
    x = np.concatenate([feeds["x"] for _, feeds in block.batches()])
    return len(x), {"second": x.T @ x}, os.getpid() * 0


@needs_ray
def test_the_same_bits_as_here(compute):
    wanted = asked(moments)
    found, done = total(compute, wanted)
    expected, _ = total(here, wanted)
    assert found[0] == done == 40
    assert found[1]["second"].tobytes() == expected[1]["second"].tobytes()


@needs_ray
def test_the_work_is_done_by_other_processes_and_loaded_once_in_each(compute):
    def process(block):
        time.sleep(0.2)
        return {os.getpid(): 1}

    found, _ = total(compute, asked(process))
    assert sum(found.values()) == len(in_blocks(SAMPLES, 3))
    assert os.getpid() not in found
    assert len(found) == 2


@needs_ray
def test_a_killed_process_is_replaced(compute, tmp_path):
    def fatal(block):
        mark = tmp_path / str(block.first)
        if block.first == 9 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return moments(block)

    found, done = total(compute, asked(fatal))
    assert done == 40
    assert len(list(tmp_path.iterdir())) == 1
    assert found[1]["second"].tobytes() == total(here, asked(moments))[0][1]["second"].tobytes()


@needs_ray
def test_a_process_that_always_dies_is_an_error(compute, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.cluster.ray_cluster._RETRIES", 1)

    def fatal(block):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"--workers 2: the Ray cluster is lost, or a process dies .*--curves"):
        total(compute, asked(fatal, batch=40))  # one block: each death costs the start of a process


@needs_ray
def test_errors_name_the_process_and_keep_their_class(compute):
    def short(block):
        raise ShortageError("no memory for it")

    def wrong(block):
        raise ValueError("a number\nof lines")

    with pytest.raises(ShortageError, match=r"^worker .+ \(process \d+\): no memory for it$"):
        total(compute, asked(short))
    with pytest.raises(ClusterError, match=r"^worker .+ \(process \d+\): ValueError: a number$"):
        total(compute, asked(wrong))


@needs_ray
def test_works_that_come_again_are_not_sent_again(compute):
    sender, work, other = compute.__self__.sender, work_of(moments), work_of(len)
    parcels = sender.shared([work])
    assert sender.shared((work,)) is parcels
    assert sender.shared([other]) is not parcels


@needs_ray
@pytest.mark.parametrize("moved", [False, True], ids=["the same file", "a copy"])
def test_weights_in_files_travel_with_the_model(compute, tmp_path, monkeypatch, moved):
    monkeypatch.setattr(external, "DETACHED", 1)
    weight = np.random.default_rng(0).standard_normal((200, 200), np.float32)
    graph = onnx.helper.make_graph([], "g", [], [], [numpy_helper.from_array(weight, "w")])
    model = Shelf(lambda: tmp_path).detached(onnx.helper.make_model(graph))
    (path,) = tmp_path.iterdir()

    def read(block):
        (tensor,) = model.graph.initializer
        return values(tensor).sum(dtype=np.float64) * len(block)

    for _ in range(2):
        found, _ = total(compute, asked(read))
        assert found == pytest.approx(40 * weight.sum(dtype=np.float64))
        if moved and path.exists():
            path.rename(tmp_path / "elsewhere")
    copies = Path(tempfile.gettempdir(), f"rdoq-onnx-{RUN}")
    assert len(list(copies.glob("*.weights"))) == moved
    remove_copies(RUN)
    assert not copies.exists()


def run(*options, **how):
    command = [sys.executable, "-m", "rdoq_onnx", str(MODEL), "--effort", "fast", *map(str, options)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    return subprocess.Popen([*command, "--calibration", str(CALIBRATION), "--threads", "1"], **how)


def children(process):
    """Return the names of all processes below one, by number."""
    found, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            except OSError:
                continue
    below = {process}
    while more := {p for p, parent in parents.items() if parent in below} - below:
        below |= more
    return {p: name for p, name in found.items() if p in below and p != process}


@needs_ray
def test_a_run_with_workers_of_which_one_is_killed_writes_the_same_file(tmp_path):
    home, temporary = tmp_path / "home", Path(tempfile.mkdtemp(prefix="t"))  # short: it has sockets
    home.mkdir()
    options = {"cwd": tmp_path, "env": {**os.environ, "HOME": str(home), "TMPDIR": str(temporary)}}
    assert run(tmp_path / "plain.onnx", "--bits", 4, "--quiet", **options).communicate() == ("", "")

    def remaining():
        """List all files but ONNX Runtime's database, whose journals outlive a killed process."""
        return {path for folder in (home, temporary) for path in folder.rglob("*") if ".db" not in path.name}

    left = remaining()  # by ONNX Runtime
    process = run(tmp_path / "q.onnx", "--bits", 4, "--workers", 2, "--quiet", **options)
    killed = []

    def kill():
        while process.poll() is None and not killed:
            working = [p for p, name in children(process.pid).items() if name.startswith("ray::sum_block")]
            if working:
                os.kill(working[0], signal.SIGKILL)
                killed.append(working[0])
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    output = process.communicate()
    thread.join()
    assert (process.returncode, *output) == (0, "", "")
    assert killed
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert remaining() == left
    shutil.rmtree(temporary)


@needs_ray
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    temporary = Path(tempfile.mkdtemp(prefix="t"))
    options = {"cwd": tmp_path, "env": {**os.environ, "TMPDIR": str(temporary)}}
    process = run(tmp_path / "q.onnx", "--bits", 4, "--effort", "best", "--workers", 2, "--quiet", **options)
    while not any(name.startswith("ray::sum_block") for name in children(process.pid).values()):
        time.sleep(0.05)
        assert process.poll() is None
    started = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert [text.strip() for text in process.communicate(timeout=60)] == ["", "rdoq-onnx: interrupted"]
    assert process.returncode == 130
    assert len(started) > 4
    while any(Path(f"/proc/{number}").exists() for number in started):
        time.sleep(0.05)
    assert not list(temporary.glob("rdoq*"))
    shutil.rmtree(temporary)


@needs_ray
@pytest.mark.parametrize("kind", ["small", "large"])
def test_sums_and_layers_of_either_kind_of_network(compute, kind, monkeypatch):
    model, samples, bits = small_or_large(kind, monkeypatch)
    monkeypatch.setattr("rdoq_onnx.refinement.lookahead.WORTH", 0)

    def emitted(job):
        return job.result(config).model.SerializeToString()

    config, counted = Config(**bits, threads=1), []

    def counting(asked, indices):
        for index, value in compute(asked, indices):
            counted.append(asked.name.split(" of ")[0])
            yield index, value

    plain = emitted(Job.of(model, samples, config, Progress()))
    assert emitted(Job.of(model, samples, config, Progress()).computed_by(counting)) == plain
    assert {{"small": "taylor", "large": "layers"}[kind], "trials"} <= {*counted}


@pytest.mark.parametrize(
    ("message", "failing", "started"),
    [("The node timed out during startup", 1, 2), ("timed out during startup", 9, 3), ("no rights", 1, 1)],
)
def test_a_busy_machine_gets_more_time_to_start(monkeypatch, message, failing, started):
    folders = []

    def init(**options):
        folders.append(Path(options["_temp_dir"]))
        assert [f for f in folders if f.exists()] == folders[-1:]
        if len(folders) <= failing:
            raise RuntimeError(message)

    spec = importlib.machinery.ModuleSpec("ray", None)
    fake = SimpleNamespace(__spec__=spec, init=init, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with contextlib.ExitStack() as expected:
        if failing >= started:
            expected.enter_context(pytest.raises(ClusterError, match=f"--workers 2: Ray does not start .*{message}"))
        with computing("2", 1) as compute:
            assert compute.__self__.ray is fake
    assert len(folders) == started
    assert not any(f.exists() for f in folders)


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.cluster.ray_cluster.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--workers 2 needs the package ray: pip install 'rdoq-onnx\[ray\]'$"):
        rdoq_onnx.quantize(MODEL, CALIBRATION, workers=2)


@pytest.mark.parametrize("workers", ["1", "16", "auto", "ray://head:10001", "ray://10.0.0.1:10001"])
def test_what_workers_may_be(workers):
    assert Config(workers=workers).workers == workers


@pytest.mark.parametrize("workers", ["0", "-1", "two", "2000000", "ray://head", "head:10001", ""])
def test_what_workers_may_not_be(workers):
    with pytest.raises(ConfigError, match="give 1 to 1024 processes, auto, or ray://HOST:PORT"):
        Config(workers=workers)
