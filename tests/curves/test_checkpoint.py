"""`--curves`: measure once, resume after a killed run, reject a file of another measurement."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import fields

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import api, cli, pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.curves import checkpoint
from rdoq_onnx.curves.checkpoint import Store
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system.progress import Progress

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N,3,8,8] x) => (float[N,5] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Relu (a) c = Conv <pads = [1, 1, 1, 1]> (b, v) d = Relu (c)
    p = GlobalAveragePool (d) f = Flatten (p) y = MatMul (f, u) }"""
SHAPES = {"w": (6, 3, 3, 3), "v": (8, 6, 3, 3), "u": (8, 5)}
MEASURING = {"equalize", "observe", "moments", "candidates", "clipping", "taylor", "ties"}


@pytest.fixture
def files(tmp_path):
    """Return a folder with model.onnx and x.npy."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(TEXT)
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) * 0.3, n) for n, s in SHAPES.items()
    )
    onnx.save(model, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", rng.standard_normal((40, 3, 8, 8)).astype(np.float32))
    return tmp_path


class Run:
    """A run through the pipeline, with the steps that it took."""

    def __init__(self, folder, curves=None, calibration="x.npy", **settings):
        progress = Progress()
        config = Config(threads=1, **settings)
        result = pipeline.run(folder / "model.onnx", folder / calibration, config, progress, curves)
        self.steps, self.data = set(result.report.seconds), result.model.SerializeToString()


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_a_second_run_measures_nothing_and_gives_the_same(files, effort):
    fresh, other = (Run(files, effort=effort, weight_bits=b) for b in (4, 3))
    curves = files / "c.curves"
    first, second = (Run(files, curves, effort=effort, weight_bits=b) for b in (4, 3))
    assert first.steps >= MEASURING - {"ties"}
    assert not second.steps & MEASURING
    assert (first.data, second.data) == (fresh.data, other.data)


def test_outputs_of_the_float_network_are_kept(files, monkeypatch):
    curves = files / "c.curves"
    fresh = Run(files, weight_bits=3)
    Run(files, curves, weight_bits=4)

    def again(*_):
        raise AssertionError

    for name in ("judge.float_outputs", "reference.Reference._float_runs", "affine_correction._float_outputs"):
        monkeypatch.setattr(f"rdoq_onnx.refinement.{name}", again)
    before = curves.read_bytes()
    assert Run(files, curves, weight_bits=3).data == fresh.data
    assert curves.read_bytes() == before


def test_arrays_keep_their_dtype_and_memory_order(tmp_path):
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.ones((2, 3))),
        np.array(3.5),
        np.zeros((0, 3)),
        np.ones((4, 4))[::2],
        np.int8([1, 2]),
        np.array([True]),
        np.float64([7]),
    ]
    binding = checkpoint.Binding("m", "s", {})
    Store(tmp_path / "c.curves", binding).put("a", tuple(arrays))
    with np.load(tmp_path / "c.curves") as members:
        assert sorted(members) == ["b1", "f8", "header", "i1"]
    for found, array in zip(Store.open(tmp_path / "c.curves", binding).get("a"), arrays, strict=True):
        np.testing.assert_array_equal(found, array)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        if array.size > 1:
            assert found.flags.c_contiguous == (array.flags.c_contiguous or not array.flags.f_contiguous)


def test_one_file_holds_both_activation_regimes_and_float_activations(files):
    curves = files / "c.curves"
    for bits in (8, 4, None):
        fresh = Run(files, effort="fast", activation_bits=bits)
        first, second = (Run(files, curves, effort="fast", activation_bits=bits) for _ in range(2))
        assert first.steps >= {"taylor"}
        assert not second.steps & MEASURING
        assert first.data == second.data == fresh.data


def test_the_python_api_keeps_curves_too(files):
    curves = files / "c.curves"
    first, second = (api.measure(files / "model.onnx", files / "x.npy", curves=curves) for _ in range(2))
    assert first.network == second.network
    np.testing.assert_array_equal(first.curves.distortion, second.curves.distortion)
    result = api.quantize(files / "model.onnx", files / "x.npy", bits=5, curves=files / "d.curves", effort="fast")
    assert (files / "d.curves").exists()
    assert result.report.sqnr_db > 0


def refusal(files, **changed):
    with pytest.raises(ConfigError) as caught:
        Run(files, files / "c.curves", effort="fast", **changed)
    message = str(caught.value)
    assert message.startswith(f"--curves {files / 'c.curves'}: ")
    assert "\n" not in message
    return message


def test_another_measurement_is_rejected_with_the_difference(files):
    Run(files, files / "c.curves", effort="fast")
    before = (files / "c.curves").read_bytes()
    for field, value, said in (
        ("seed", 1, "--seed 0, not 1"),
        ("exclude", ("u",), "--exclude none, not u"),
        ("widths", (2, 4), "--widths 0,1,2,3,4,5,6,7,8, not 2,4"),
        ("measure", "probe", "--measure taylor, not probe"),
        ("target", "openvino", "--target onnxruntime, not openvino"),
    ):
        assert said in refusal(files, **{field: value})
    with pytest.raises(ConfigError, match="--effort fast, not default"):
        Run(files, files / "c.curves")
    assert "other samples" in refusal(files, samples=20)
    np.save(files / "z.npy", np.load(files / "x.npy") + 1)
    assert "other samples" in refusal(files, calibration="z.npy")
    model = onnx.load(files / "model.onnx")
    model.graph.initializer[0].raw_data = np.ones(SHAPES["w"], np.float32).tobytes()
    onnx.save(model, files / "model.onnx")
    assert "another model" in refusal(files)
    assert (files / "c.curves").read_bytes() == before


def test_a_measurement_without_held_out_samples_is_rejected(files):
    """A run would verify on the samples that it was fitted on."""
    api.measure(files / "model.onnx", files / "x.npy", curves=files / "c.curves", effort="fast", threads=1)
    assert "other samples" in refusal(files)


def test_another_version_is_rejected(files, monkeypatch):
    Run(files, files / "c.curves", effort="fast")
    monkeypatch.setattr(checkpoint, "__version__", "99.0")
    assert "this is 99.0" in refusal(files)
    monkeypatch.setattr(checkpoint, "VERSION", 98)
    assert "this program reads 98" in refusal(files)


def test_a_file_that_is_not_a_curves_file_is_rejected_and_kept(files):
    Run(files, files / "c.curves", effort="fast")
    whole = (files / "c.curves").read_bytes()
    np.savez(files / "other.npz", x=np.ones(3))
    for data in (b"", b"hello", whole[: len(whole) // 2], (files / "other.npz").read_bytes()):
        (files / "c.curves").write_bytes(data)
        assert "is not a curves file" in refusal(files)
        assert (files / "c.curves").read_bytes() == data


def test_every_setting_is_either_bound_or_declared_not_to_matter():
    """A new setting is bound by default; declare it with `measured=False` if curves do not depend on it."""
    bound = {"block_size", "distortion", "effort", "exclude", "exclude_ops", "measure", "seed", "target", "widths"}
    assert set(Config().measuring()) == {f.name for f in fields(Config) if f.metadata["measured"]} == bound


KILLED = """
import os, signal, sys
from rdoq_onnx import cli
from rdoq_onnx.curves import checkpoint
checkpoint._PAUSE = checkpoint._SHARE = 0
put, left = checkpoint.Store.put, int(sys.argv[2])
def killed(self, name, value, **rest):
    global left
    put(self, name, value, **rest)
    left -= name.endswith(sys.argv[1])
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Store.put = killed
cli.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("step", "times", "measure", "finished"),
    [
        ("candidates", 0, "taylor", {"moments", "candidates"}),
        ("taylor, so far", 1, "taylor", {"clipping"}),
        ("ties, so far", 3, "taylor", {"taylor"}),
        ("probe, so far", 1, "probe", {"candidates"}),
    ],
)
def test_a_run_killed_by_signal_9_is_resumed(files, monkeypatch, step, times, measure, finished):
    monkeypatch.setattr("rdoq_onnx.observation.batching._MAX_BATCH", 4)
    curves = files / "c.curves"
    arguments = [
        files / "model.onnx",
        files / "out.onnx",
        "--calibration",
        files / "x.npy",
        "--threads",
        "1",
        "--weight-bits",
        "3",
        "--measure",
        measure,
        "--curves",
        curves,
    ]
    code = "import rdoq_onnx.observation.batching as o; o._MAX_BATCH = 4\n" + KILLED
    command = [sys.executable, "-c", code, step, str(times), *map(str, arguments)]
    # Not in the root: its source folder, which lacks passes/, would be found before the installed package.
    killed = subprocess.run(command, capture_output=True, cwd=files)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (files / "out.onnx").exists()
    starts = {}
    monkeypatch.setattr(Progress, "show", watched(starts))
    resumed = Run(files, curves, weight_bits=3, measure=measure)
    assert not resumed.steps & (finished | {"equalize", "observe"})
    if "so far" in step:
        assert starts[step.split(",")[0]] > 0
    assert resumed.data == Run(files, weight_bits=3, measure=measure).data
    assert not Run(files, curves, measure=measure, weight_bits=4).steps & MEASURING


def watched(starts):
    """Return a `Progress.show` that records how many parts of each step are done at its start."""
    from contextlib import contextmanager

    @contextmanager
    def show(self, name, total):
        yield lambda done: starts.setdefault(name, done)

    return show


def test_unfinished_values_are_written_only_from_time_to_time(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "_write", lambda path, binding, values: written.append(dict(values)))
    store = Store(tmp_path / "c.curves", checkpoint.Binding("m", "s", {}))
    for k in range(5):
        store.put("a", k, finished=False)
    assert written == [{"a": 0}]
    store.put("b", 1)
    assert written[1:] == [{"a": 4, "b": 1}]
    store.drop("a")
    assert store.get("a") is None


def test_several_budgets_from_one_measurement(files, capsys):
    arguments = [files / "model.onnx", files / "m{bits}.onnx", "--calibration", files / "x.npy", "--threads", "1"]
    options = ["--effort", "fast", "--bits", "3, 6,4.5", "--json", files / "all.json", "--curves", files / "c.curves"]
    cli.main([*map(str, arguments), *map(str, options)])
    shown = capsys.readouterr()
    assert "rate and distortion" in shown.out
    assert len(re.findall(r"\d sensitivities:", shown.err)) == 2  # narrow and wide activations
    reports = json.loads((files / "all.json").read_text())
    assert [r["output"] for r in reports] == [str(files / f"m{b}.onnx") for b in ("3", "6", "4.5")]
    assert [round(r["bits"]["weights"], 1) for r in reports] == [3.0, 6.0, 4.5]
    for bits in ("3", "6", "4.5"):
        alone = Run(files, effort="fast", weight_bits=float(bits), activation_bits=float(bits)).data
        assert (files / f"m{bits}.onnx").read_bytes() == alone
    cli.main(
        [
            *map(str, arguments),
            "--effort",
            "fast",
            "--bits",
            "2,5",
            "--json",
            str(files / "r{bits}.json"),
            "--curves",
            str(files / "c.curves"),
            "--quiet",
        ]
    )
    assert [json.loads((files / f"r{b}.json").read_text())["output"] for b in (2, 5)] == [
        str(files / f"m{b}.onnx") for b in (2, 5)
    ]


def failed(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*map(str, arguments), "--quiet", "--threads", "1"])
    return caught.value.code, capsys.readouterr().err


def test_budgets_that_fail_are_named_and_the_others_written(files, capsys):
    arguments = [files / "model.onnx", files / "m{bits}.onnx", "--calibration", files / "x.npy", "--effort", "fast"]
    code, said = failed([*arguments, "--bits", "1,8", "--min-sqnr", "20"], capsys)
    assert code == 4
    assert said.startswith("rdoq-onnx: error: --bits 1: --min-sqnr 20")
    assert said.count("\n") == 1
    assert [p.name for p in files.glob("m?.onnx")] == ["m8.onnx"]
    code, said = failed([*arguments, "--bits", "1,6", "--widths", "4-8", "--json", files / "a.json"], capsys)
    assert code == 3, said
    documents = json.loads((files / "a.json").read_text())
    assert [d["passed"] for d in documents] == [False, True]
    assert "cannot be met" in documents[0]["reason"]


def test_names_need_the_budget_where_there_are_several(files, capsys):
    arguments = [files / "model.onnx", files / "m.onnx", "--calibration", files / "x.npy", "--bits", "3,4"]
    code, said = failed(arguments, capsys)
    assert code == 2
    assert "give a name with {bits} in it" in said
    arguments[1] = files / "m{bits}.onnx"
    code, said = failed([*arguments, "--modified", files / "f.onnx"], capsys)
    assert code == 2
    assert "--modified" in said
    code, said = failed([*arguments[:-1], "3,x"], capsys)
    assert code == 2
    assert "'x' is not a number" in said
