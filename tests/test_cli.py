"""The command line as users see it: the results of a good run, and the error of each bad input."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, parser

import rdoq_onnx
from rdoq_onnx import __version__, cli
from rdoq_onnx.emission.tensorrt_rules import violations
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.verification.widths import constants
from tests.conftest import ROOT, OrtRun

MODELS = ROOT / "models"
CNN, VIT, CALIBRATION = MODELS / "digits_cnn.onnx", MODELS / "digits_vit.onnx", MODELS / "digits_calib.npz"
FEW = ("--calibration", str(CALIBRATION), "--samples", "8", "--threads", "1")
BEFORE = b"what was here before"


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; that there is just one, and nothing like a traceback, is checked here."""
        lines = [line for line in self.err.splitlines() if line.startswith("rdoq-onnx: error: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        assert "Traceback" not in self.err
        return lines[0]


Main = Callable[..., Run]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """`main(*arguments)`: the command, in this process."""

    def run(*arguments: str | Path) -> Run:
        code = 0
        capsys.readouterr()
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return Run(code, *capsys.readouterr())

    return run


def spawn(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Run:
    """The command in a process of its own, far from the repository."""
    done = subprocess.run(
        [sys.executable, "-m", "rdoq_onnx", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def log_lines(err: str) -> list[str]:
    """Standard error without the lines that tell the time and how far the run is."""
    return [line for line in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d [a-z0-9]", line)]


# --- a good run


@dataclass(frozen=True)
class Done:
    """What a good run left."""

    run: Run
    original: Path
    output: Path
    modified: Path
    report: dict[str, Any]

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.output)


@pytest.fixture(scope="module", params=[CNN, VIT], ids=["cnn", "vit"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("done")
    output, modified, report = folder / "out.onnx", folder / "modified.onnx", folder / "report.json"
    run = spawn(
        request.param,
        output,
        "--bits",
        "4",
        *FEW,
        "--keep-channels",
        "--modified",
        modified,
        "--json",
        report,
        cwd=folder,
    )
    assert run.code == 0, run.err
    return Done(run, request.param, output, modified, json.loads(report.read_text()))


def test_channels_without_bits_are_removed(main: Any, tmp_path: Path, ort_run: OrtRun) -> None:
    kept, removed = tmp_path / "kept.onnx", tmp_path / "removed.onnx"
    options = ("--bits", "6", "--effort", "fast", "--pin", "/0/Conv[0:16]=0", *FEW)
    assert main(CNN, kept, *options, "--keep-channels").code == 0
    run = main(CNN, removed, *options)
    assert run.code == 0, run.out
    counts = re.search(r"(\d+) removed, (\d+) kept", run.out)
    assert counts
    assert int(counts[1]) >= 8
    assert run.out.count("0-bit channels kept: ") >= (int(counts[2]) > 0), "each kept channel has a reason"
    assert removed.stat().st_size < kept.stat().st_size
    x = {"input": digits(8)}
    before, after = (ort_run(onnx.load(path), x, "all")[0] for path in (kept, removed))
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "storage"), [("onnxruntime", "native"), ("openvino", None), ("openvino", "int8"), ("tensorrt", None)]
)
def test_targets(main: Any, tmp_path: Path, target: str, storage: str | None) -> None:
    output, chosen = tmp_path / "out.onnx", ("--storage", storage) if storage else ()
    assert main(CNN, output, "--bits", "4", "--effort", "fast", "--target", target, *chosen, *FEW).code == 0
    emitted = onnx.load(output)
    stored = {t.data_type for t in emitted.graph.initializer}
    assert (TensorProto.INT4 in stored) == (storage != "int8" and target != "tensorrt")
    assert (TensorProto.INT2 in stored) <= (target == "onnxruntime")
    assert (TensorProto.UINT8 in stored) == (target != "tensorrt")
    assert not violations(emitted) or target != "tensorrt"


def test_tensorrt_is_not_judged_by_kernels_that_saturate(main: Any, tmp_path: Path) -> None:
    """Its weights have 8 bits, which ONNX Runtime's fused kernels do not bear on every CPU."""
    output = tmp_path / "out.onnx"
    assert main(CNN, output, "--bits", "8", "--effort", "fast", "--target", "tensorrt", *FEW).code == 0
    emitted = onnx.load(output)
    weights = [numpy_helper.to_array(t) for t in emitted.graph.initializer if len(t.dims) == 4]
    assert max(int(np.abs(w.astype(np.int64)).max()) for w in weights) > 64


def test_tensorrt_decodes_weights_by_dequantize_linear_alone(main: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    options = ("--weight-bits", "4", "--activation-bits", "none", "--effort", "fast", "--target", "tensorrt")
    assert main(CNN, output, *options, *FEW).code == 0
    emitted = onnx.load(output)
    used = {n.op_type for n in emitted.graph.node}
    assert "DequantizeLinear" in used
    assert not used & {"QuantizeLinear", "Cast", "Mul"}
    assert not violations(emitted)


def test_storage_that_a_target_cannot_read(main: Any, tmp_path: Path) -> None:
    output, options = tmp_path / "out.onnx", ["--target", "tensorrt", "--storage", "packed"]
    refused(main, [CNN, output, *FEW, *options], output, 2, "--storage", "--target tensorrt")


def test_storage_that_the_runtime_at_hand_cannot_read(
    main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "version", (1, 23))
    output, options = tmp_path / "out.onnx", ["--bits", "6", "--effort", "fast", *FEW]
    refused(main, [CNN, output, *options, "--storage", "native"], output, 2, "--storage native", "1.24", "1.23")
    assert main(CNN, output, *options, "--target", "openvino").code == 0


def digits(count: int) -> NDArray[np.float32]:
    with np.load(MODELS / "digits_test.npz") as data:
        scaled: NDArray[np.float32] = (data["x"][:count] / np.float32(255) - data["mean"]) / data["std"]
    return scaled.transpose(0, 3, 1, 2).astype(np.float32)


def keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """The names in a JSON document, in order; the contents of histograms, steps and lists are tested elsewhere."""
    free = ("histogram", "seconds")
    return {k: keys(v) if isinstance(v, dict) and k not in free else None for k, v in document.items()}


def test_main_job_writes_a_model_that_still_works(done: Done, ort_run: OrtRun) -> None:
    onnx.checker.check_model(done.output)
    x = digits(200)
    expected, got = (ort_run(onnx.load(p), {"input": x}, "all")[0] for p in (done.original, done.output))
    assert (expected.argmax(axis=1) == got.argmax(axis=1)).mean() > 0.8


def test_json_has_the_keys_of_the_contract(done: Done) -> None:
    assert keys(done.report) == {
        "version": None,
        "input": None,
        "output": None,
        "passed": None,
        "reason": None,
        "bits": {"weights": None, "activations": None},
        "weights": {"channels": None, "elements": None, "payload_bytes": None, "scale_bytes": None, "histogram": None},
        "activations": {"tensors": None, "elements": None, "histogram": None},
        "distortion": {
            "predicted": None,
            "measured": None,
            "sqnr_db": None,
            "optimality_gap": None,
            "metric": None,
            "divergence": {"unit": None, "predicted": None, "measured": None, "diverted": None},
            "curves": None,
            "parts": None,
        },
        "cost": None,
        "agreement": {"percent": None, "bound_percent": None, "samples": None, "accuracy": None},
        "file_bytes": {"input": None, "output": None},
        "seconds": None,
        "latency": None,
        "running": None,
        "advice": None,
        "calibration": {"source": None, "samples": None, "likeness": None, "supplied": None},
        "layers": None,
        "layer_samples": None,
        "skipped": None,
    }
    assert {tuple(layer) for layer in done.report["layers"]} == {
        ("name", "op", "channels", "bits", "activation_bits", "tables", "block_size", "cost", "sqnr_db")
    }
    (part,) = done.report["distortion"]["parts"]
    assert tuple(part) == ("name", "output", "predicted", "measured", "sqnr_db", "bound_db")
    assert {tuple(skip) for skip in done.report["skipped"]} <= {("node", "reason")}


def test_json_describes_this_run(done: Done) -> None:
    report = done.report
    assert (report["version"], report["input"], report["output"]) == (__version__, str(done.original), str(done.output))
    calibration = {"source": str(CALIBRATION), "samples": 8, "likeness": report["calibration"]["likeness"]}
    assert report["calibration"] == calibration | {"supplied": []}
    assert 0 < calibration["likeness"] < 1
    assert report["file_bytes"] == {"input": done.original.stat().st_size, "output": done.output.stat().st_size}
    assert set(report["seconds"]) >= {"normalize", "observe", "candidates", "taylor", "emit", "verify", "latency"}
    assert report["passed"]
    (part,) = report["distortion"]["parts"]
    for figure in ("predicted", "measured", "sqnr_db"):
        assert part[figure] == pytest.approx(report["distortion"][figure])
        assert part[figure] > 0
    assert part["bound_db"] is None  # one sample proves nothing
    assert report["distortion"]["optimality_gap"] >= 0
    assert [tuple(x) for x in report["latency"]] == 2 * [
        ("batch", "float_ms", "quantized_ms", "ratio", "spread", "others")
    ]
    assert [x["batch"] for x in report["latency"]] == [1, 8]
    assert any("held-out" in line for line in report["advice"])


def test_json_agrees_with_a_recount_of_the_file(done: Done) -> None:
    graph, report = done.model.graph, done.report
    nodes = {n.name: n for n in graph.node}
    producer = {o: n for n in graph.node for o in n.output}
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    sources = {x["name"]: producer[nodes[x["name"]].input[1]].input[0] for x in report["layers"]}
    decoded = dict(zip(sources, constants(done.model, list(sources.values()), Runtime("cpu", 1)), strict=True))
    elements = spent = 0
    for layer in report["layers"]:
        node = nodes[layer["name"]]
        assert node.op_type == layer["op"]
        decoder = producer[node.input[1]]
        assert decoder.op_type == "DequantizeLinear"
        integers = decoded[layer["name"]].astype(int)
        axis = next((a.i for a in decoder.attribute if a.name == "axis"), 1) % integers.ndim
        channels = np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1)
        bits = np.array(layer["bits"])
        assert layer["channels"] == len(bits) == len(channels)
        assert (np.ptp(channels, axis=1) < 2**bits).all(), layer["name"]
        assert layer["activation_bits"] == width_in_front(node.input[0], producer, values)
        elements += integers.size
        spent += int(bits.sum()) * channels.shape[1]
    widths, counts = np.unique(np.concatenate([x["bits"] for x in report["layers"]]), return_counts=True)
    weights = report["weights"]
    assert weights["histogram"] == {str(w): n for w, n in zip(widths.tolist(), counts.tolist(), strict=True)}
    assert weights["channels"] == counts.sum()
    assert weights["elements"] == elements
    assert weights["payload_bytes"] == -(-spent // 8)
    assert report["bits"]["weights"] == pytest.approx(spent / elements)
    assert report["bits"]["weights"] <= 4
    assert report["bits"]["activations"] <= 4
    assert report["activations"]["tensors"] == sum(report["activations"]["histogram"].values())


PASSED = {"DequantizeLinear", "QuantizeLinear", "Clip", "Reshape", "Transpose", "Flatten", "Gather", "Squeeze"}


def width_in_front(
    tensor: str, producer: Mapping[str, onnx.NodeProto], values: Mapping[str, NDArray[Any]]
) -> int | None:
    """The width of the quantizer whose values reach `tensor`: the highest integer that its Clip leaves."""
    quantized = False
    while (node := producer.get(tensor)) is not None and node.op_type in PASSED:
        if node.op_type == "Clip":
            return int(values[node.input[2]]).bit_length()
        quantized |= node.op_type == "DequantizeLinear"
        tensor = node.input[0]
    return 8 if quantized else None


def test_metadata_records_how_the_file_was_made(done: Done) -> None:
    metadata = {p.key: p.value for p in done.model.metadata_props}
    assert metadata["rdoq_onnx.version"] == __version__
    settings = json.loads(metadata["rdoq_onnx.settings"])
    assert (settings["weight_bits"], settings["activation_bits"], settings["samples"]) == (4, 4, 8)
    assert str(MODELS) not in "".join(metadata.values()), "folders of the machine are nobody's business"


def test_modified_network_is_the_float_one_at_zero_and_takes_perturbations(done: Done, ort_run: OrtRun) -> None:
    modified, x = onnx.load(done.modified), {"input": digits(4)}
    onnx.checker.check_model(modified)
    parameters = [i.name for i in modified.graph.input if i.name.startswith("s_")]
    assert len(parameters) > len(done.report["layers"])
    still = ort_run(modified, x)[0]
    assert np.allclose(still, ort_run(onnx.load(done.original), x)[0], rtol=1e-4, atol=1e-4)
    session = ort.InferenceSession(done.modified, providers=["CPUExecutionProvider"])
    ranks = {i.name: len(i.shape) for i in session.get_overridable_initializers()}
    assert set(parameters) <= set(ranks)
    last = parameters[-1]
    moved = session.run(None, {**x, last: np.ones((1,) * ranks[last], np.float32)})[0]
    assert not np.allclose(moved, still)


def test_log_is_plain_lines_and_the_table_goes_to_stdout(done: Done) -> None:
    assert "\x1b" not in done.run.err + done.run.out
    assert log_lines(done.run.err) == []
    assert f"{done.report['distortion']['sqnr_db']:.2f} dB" in done.run.out
    rows = [line.split("│")[1].strip() for line in done.run.out.splitlines() if line.startswith("│")]
    assert {"output SQNR", "weight data", "channels by bits", "gain over one width everywhere"} < set(rows)


def test_same_run_writes_the_same_bytes(done: Done, tmp_path: Path) -> None:
    calibration = tmp_path / "elsewhere.npz"
    calibration.write_bytes(CALIBRATION.read_bytes())
    arguments = ("--calibration", calibration, "--samples", "8", "--threads", "1")
    options, env = ("--bits", "4", "--keep-channels", *arguments), {"PYTHONHASHSEED": "7"}
    again = spawn(done.original, "again.onnx", *options, cwd=tmp_path, env=env)
    assert again.code == 0, again.err
    assert (tmp_path / "again.onnx").read_bytes() == done.output.read_bytes()


def test_quiet_prints_nothing(main: Main, tmp_path: Path) -> None:
    run = main(CNN, tmp_path / "out.onnx", *FEW, "--quiet")
    assert run == Run(0, "", "")
    assert (tmp_path / "out.onnx").exists()


def test_verbose_lists_every_layer(main: Main, tmp_path: Path) -> None:
    run = main(CNN, tmp_path / "out.onnx", *FEW, "--verbose", "--json", tmp_path / "out.json", "--exclude", "/3/Conv")
    report = json.loads((tmp_path / "out.json").read_text())
    for layer in report["layers"]:
        mean = sum(layer["bits"]) / layer["channels"]
        pin = f"  --pin {layer['name']}={round(mean)} "
        (line,) = (x for x in run.out.splitlines() if x.startswith(pin))
        assert f" # {layer['op']}, {layer['channels']} channels, {mean:.2f} bits" in line
    assert report["skipped"] == [{"node": "/3/Conv", "reason": "excluded by --exclude"}]
    assert "  Conv /3/Conv: excluded by --exclude" in run.out


def test_synthetic_samples_come_with_a_warning(main: Main, tmp_path: Path) -> None:
    run = main(CNN, tmp_path / "out.onnx", "--samples", "8", "--json", tmp_path / "out.json")
    assert run.code == 0
    assert log_lines(run.err) == [
        "rdoq-onnx: warning: no --calibration, so samples are synthetic and all figures only indicative"
    ]
    calibration = json.loads((tmp_path / "out.json").read_text())["calibration"]
    assert (calibration["source"], calibration["samples"], calibration["supplied"]) == ("synthetic", 8, [])


def test_pins_float_activations_and_widths_are_obeyed(main: Main, tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    options = ("--weight-bits", "4", "--activation-bits", "none", "--widths", "2,4,8", "--pin", "/0/.*=8")
    assert main(CNN, tmp_path / "out.onnx", *FEW, *options, "--json", report).code == 0
    document = json.loads(report.read_text())
    assert document["bits"]["activations"] is None
    assert set(document["weights"]["histogram"]) <= {"2", "4", "8"}
    first = next(x for x in document["layers"] if x["name"] == "/0/Conv")
    assert set(first["bits"]) == {8}
    assert first["activation_bits"] is None


def test_markup_in_a_path_is_no_markup(main: Main, tmp_path: Path) -> None:
    odd = tmp_path / "[red]" / "["
    odd.mkdir(parents=True)
    run = main(CNN, odd / "b].onnx", *FEW)
    assert run.code == 0
    assert "[red]/[/b].onnx" in run.out


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rdoq_onnx", CNN, "out.onnx", *FEW]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == 0
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_and_version(main: Main, option: str) -> None:
    run = main(option)
    assert (run.code, run.err) == (0, "")
    if option == "--version":
        assert run.out.strip() == __version__
    else:
        assert all(text in run.out for text in ("--weight-bits", "decibels", "[default: 0-8]"))


# --- bad input: one line, the exit code, and the output as it was


def refused(main: Main, arguments: Sequence[str | Path], output: Path, code: int, *said: str) -> None:
    """Run twice, onto nothing and onto a file: exit `code`, one line with all of `said`, the output untouched."""
    for before in (None, BEFORE):
        if before is not None:
            output.write_bytes(before)
        run = main(*arguments)
        assert run.code == code, run.err
        assert run.out == ""
        for part in said:
            assert part in run.error, run.error
        assert (output.read_bytes() if output.exists() else None) == before
    assert [p.name for p in output.parent.iterdir() if p.name.startswith(".")] == [], "temporary files are left"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory); give an .onnx file"),
        (CNN.read_bytes()[:5000], "is truncated; export or download it again"),
        (b"no model at all", "is not an ONNX model"),
        (b"", "is empty"),
    ],
    ids=["missing", "truncated", "text", "empty"],
)
def test_unusable_model_files(main: Main, tmp_path: Path, content: bytes | None, said: str) -> None:
    source, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    if content is not None:
        source.write_bytes(content)
    refused(main, [source, output, *FEW], output, 2, str(source), said)


def test_weights_whose_products_overflow(tmp_path: Path) -> None:
    """In a process of its own: numpy says a thing once."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, v) }""")
    huge = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * np.float32(1e18)
    model.graph.initializer.extend([numpy_helper.from_array(huge, name) for name in "wv"])
    onnx.save(model, tmp_path / "in.onnx")
    done = spawn("in.onnx", "out.onnx", "--quiet", cwd=tmp_path)
    assert done.code == 2
    assert done.err == f"{done.error}\n"
    assert "is not finite" in done.error


def test_model_without_a_layer(main: Main, tmp_path: Path) -> None:
    source, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        computed (float[N, 4] x, float[4, 3] w) => (float[N, 3] y) { y = MatMul(x, w) }
    """
    onnx.save(parser.parse_model(text), source)
    refused(main, [source, output], output, 2, "no layer to quantize", "MatMul", "no weight")


FITTING = np.linspace(-1, 1, 8 * 28 * 28, dtype=np.float32).reshape(8, 1, 28, 28)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"image": FITTING, "other": FITTING}, "no array for input 'input'; rename"),
        ({"input": FITTING[..., :20]}, "'input' has shape [8,1,28,20], but the model expects [?,1,28,28]; resize"),
        ({"input": FITTING[:, 0]}, "'input' has shape [8,28,28]"),
        ({"input": FITTING.astype(np.int64)}, "'input' is int64, but the model expects float32; convert it"),
        ({"input": FITTING.astype(np.complex64)}, "'input' is complex64"),
        ({"input": np.where(FITTING > 0.9, np.nan, FITTING)}, "'input' holds NaN or infinity; remove"),
        ({"input": np.where(FITTING > 0.9, np.inf, FITTING)}, "'input' holds NaN or infinity; remove"),
        ({"input": FITTING[:0]}, "'input' holds no samples; give at least one"),
        ({"input": FITTING[:1]}, "holds 1 sample; at least 2 are needed"),
        ({"input": np.array([{}], object)}, "holds an array of Python objects; save numbers only"),
        ({}, "write it with numpy.savez"),
    ],
    ids=["names", "shape", "rank", "dtype", "complex", "nan", "inf", "zero", "one", "objects", "none"],
)
def test_unusable_samples(main: Main, tmp_path: Path, arrays: dict[str, NDArray[Any]], said: str) -> None:
    samples, output = tmp_path / "samples.npz", tmp_path / "out.onnx"
    np.savez(samples, **arrays)  # type: ignore[arg-type]  # numpy's stub takes any name for allow_pickle
    refused(main, [CNN, output, "--calibration", samples], output, 2, str(samples), said)


@pytest.mark.parametrize("content", [None, b"PK\x03\x04 but no archive", CNN.read_bytes()[:100]])
def test_unusable_sample_files(main: Main, tmp_path: Path, content: bytes | None) -> None:
    samples, output = tmp_path / "samples.npz", tmp_path / "out.onnx"
    if content is not None:
        samples.write_bytes(content)
    refused(main, [CNN, output, "--calibration", samples], output, 2, str(samples), ".npz")


@pytest.mark.parametrize("value", ["four", "-1", "8.1", "nan", "inf", "-inf", "", "2;3"])
@pytest.mark.parametrize("option", ["--bits", "--weight-bits", "--activation-bits"])
def test_impossible_bits(main: Main, tmp_path: Path, option: str, value: str) -> None:
    output = tmp_path / "out.onnx"
    refused(main, [CNN, output, *FEW, option, value], output, 2, option, value, "; give ", "to 8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "0.5"], "--bits 0.5 is out of range; give 1 to 8"),
        (["--bits", "0"], "--bits 0 is out of range; give 1 to 8"),
        (["--widths", "nine"], "--widths 'nine' is not a list of widths; give"),
        (["--widths", "2-9"], "--widths 9 is out of range; give 0 to 8"),
        (["--widths", "0-99999999999999"], "is not a list of widths"),
        (["--pin", "conv"], "--pin 'conv' is not PATTERN=BITS; give"),
        (["--pin", "/0/conv=4"], "--pin /0/conv=4 matches no layer or activation; the nearest is '/0/Conv'"),
        (["--pin", "/0/Conv=0", "--widths", "2-8"], "--pin /0/Conv=0: '/0/Conv' offers [2, 3, 4, 5, 6, 7] bits"),
        (["--pin", "Conv=4"], "matches no layer or activation; a pattern matches whole names: give '.*Conv.*'"),
        (["--pin", "/0/Conv=4", "--pin", "/0/.*=5"], "--pin /0/Conv=4 and --pin /0/.*=5 both fix channels 0 to 15 of"),
        (["--pin", "/0/Conv[0:17]=4"], "'/0/Conv' has no such channels; give a range within [0:16]"),
        (["--exclude", "Conv"], "--exclude 'Conv' matches no layer; a pattern matches whole names: give '.*Conv.*'"),
        (["--exclude", "a{99999999999}"], "--exclude 'a{99999999999}' is not a valid regular expression"),
        (["--exclude", "/0/Convs"], "--exclude '/0/Convs' matches no layer; the nearest is '/0/Conv'"),
        (["--exclude-op", "gemm"], "--exclude-op 'gemm' matches no layer's operator type; the nearest is 'Gemm'"),
        (["--size", "much"], "--size 'much' is not a valid size; give for example 1.5MB"),
        (["--size", "30kB", "--weight-bits", "4"], "--size and --weight-bits are both budgets"),
        (["--bops", "40%", "--bits", "4"], "--budget takes the place of --bits; give one"),
        (["--bops", "40%", "--activation-bits", "8"], "--budget takes the place of --activation-bits; give one"),
        (["--cost", "size", "--budget", "9kB", "--size", "9kB"], "--budget takes the place of --size; give one"),
        (["--size", "9kB", "--sqnr", "20"], "--size, --sqnr and --top1-agreement exclude each other"),
        (["--cost", "bops", "--sqnr", "20", "--bits", "4"], "--sqnr lowers what --cost counts, not --bits; leave"),
        (["--bops", "40%", "--sqnr", "20", "--joint"], "--budget takes the place of --joint; give one"),
        (["--budget", "40%"], "--budget counts what --cost says; give --cost too, or --bops"),
        (["--bops", "40%,50%"], "--bops 40%,50% writes 2 files; give a name with {budget} in it"),
        (["--sqnr", "25", "--weight-bits", "4", "--activation-bits", "8"], "need a budget to lower"),
        (["--sqnr", "25", "--top1-agreement", "99"], "exclude each other; give one"),
        (["--top1-agreement", "0.99"], "--top1-agreement 0.99 is a percentage: did you mean 99?"),
        (["--size", "9" * 400], "bytes"),
        (["--exclude", ".*"], "no layer to quantize"),
        (["--exclude", "("], "--exclude '(' is not a valid regular expression"),
        (["--joint", "--weight-bits", "3"], "--joint takes one budget: give --bits alone"),
        (["--measure", "guess"], "--measure 'guess': choose one of taylor, probe"),
        (["--provider", "tpu"], "--provider 'tpu': choose one of auto, cpu, cuda"),
        (["--samples", "1"], "--samples 1: at least 2"),
        (["--samples", "many"], "'--samples': 'many' is not a valid integer"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--threads", "-2"], "--threads -2: give 0"),
        (["--threads", "99999999999999999999"], "--threads 99999999999999999999: give 0"),
        (["--min-sqnr", "nan"], "--min-sqnr nan: give a finite number"),
        (["--quiet", "--verbose"], "--quiet and --verbose exclude each other; give one"),
        (["--none-such"], "No such option '--none-such'; see rdoq-onnx --help"),
        (["--bits"], "'--bits' requires an argument"),
        (["extra"], "unexpected extra argument (extra)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(main: Main, tmp_path: Path, options: list[str], said: str) -> None:
    output = tmp_path / "out.onnx"
    refused(main, [CNN, output, *FEW, *options], output, 2, said)


@pytest.mark.parametrize(("arguments", "missing"), [([], "INPUT"), (["in.onnx"], "OUTPUT")])
def test_missing_arguments(main: Main, arguments: list[str], missing: str) -> None:
    run = main(*arguments)
    assert run.code == 2
    assert run.err == f"rdoq-onnx: error: Missing argument '{missing}'; see rdoq-onnx --help\n"


def test_budget_that_cannot_be_met(main: Main, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    said = ("--weight-bits 2 cannot be met", "narrowest allowed widths take 4 ", "ask for more bits or allow narrower")
    refused(main, [CNN, output, *FEW, "--bits", "2", "--widths", "4-8"], output, 3, *said)


def test_bit_operations_as_the_budget(main: Main, tmp_path: Path) -> None:
    output, report, rows = tmp_path / "{budget}.onnx", tmp_path / "out.json", tmp_path / "rows.csv"
    fast = ("--effort", "fast", "--widths", "2-8", *FEW)
    page = tmp_path / "{budget}.html"
    run = main(CNN, output, "--bops", "35%,1M", "--json", report, "--report", page, "--cost-template", rows, *fast)
    assert run.code == 3
    assert run.err.splitlines()[-1].startswith(
        "rdoq-onnx: error: --bops 1M: --budget 1e+06 cannot be met: the cheapest"
    )
    assert sorted(tmp_path.glob("*.onnx")) == [tmp_path / "35%.onnx"]
    met, missed = json.loads(report.read_text())
    assert not missed["passed"]
    drawn = (tmp_path / "35%.html").read_text()
    assert all(text in drawn for text in ("<div id='frontier-cost'>", "<th>cost</th>", "M bit operations</td>"))
    cost = met["cost"]
    assert cost["spent"] <= cost["budget"] == pytest.approx(0.35 * cost["at_8_bits"])
    assert 0 < cost["bound"] <= met["distortion"]["predicted"]
    assert sum(layer["cost"] for layer in met["layers"]) == pytest.approx(cost["spent"])
    assert (cost["source"], cost["unit"]) == ("bops", "bit operations")
    assert "M bit operations, 35 % of 8 bits everywhere, of a budget of" in " ".join(run.out.replace("│", " ").split())
    # By hand: 10 outputs of 40 weights each at their bits, times the input's.
    (gemm,) = (layer for layer in met["layers"] if layer["op"] == "Gemm")
    assert gemm["cost"] == sum(gemm["bits"]) * 40 * gemm["activation_bits"]
    written = rows.read_text()
    again = main(CNN, tmp_path / "again.onnx", "--cost", rows, "--interpolate", "--budget", "35%", *fast)
    assert again.code == 0
    assert written.startswith("layer,weight_bits,activation_bits,cost\n/0/Conv,0,*,0\n")


def test_a_template_needs_no_output(main: Main, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    assert main(CNN, "--cost-template", rows).code == 0
    assert rows.read_text().count("\n") == 1 + 11 * 10
    refused = main(CNN, tmp_path / "out.onnx", "--cost", rows, "--budget", "40%", *FEW)
    assert refused.code == 2
    assert "rows.csv, line 3: cost ''; give a number of 0 or more" in refused.err


def test_the_python_api_takes_costs(tmp_path: Path) -> None:
    measured = rdoq_onnx.measure(CNN, CALIBRATION, samples=12, effort="fast")
    allocation = rdoq_onnx.allocate(measured, cost="bops", budget="40%")
    assert allocation.predicted < rdoq_onnx.allocate(measured, cost="bops", budget="30%").predicted
    path = tmp_path / "rows.csv"
    path.write_text("layer,weight_bits,activation_bits,cost_us\n.*,1-3,*,1\n.*,4-8,*,3\n")
    cheap = rdoq_onnx.allocate(measured, cost=path, budget="11us")
    assert max(map(max, cheap.layer_bits)) <= 3
    with pytest.raises(ConfigError, match="budget takes the place of bits, weight_bits and activation_bits"):
        rdoq_onnx.allocate(measured, cost="bops", budget="40%", weight_bits=4)


def test_gate_that_is_missed(main: Main, tmp_path: Path) -> None:
    output, report = tmp_path / "out.onnx", tmp_path / "out.json"
    arguments = [CNN, output, *FEW, "--min-sqnr", "90", "--json", report]
    refused(main, arguments, output, 4, "--min-sqnr 90: the emitted model has ", " dB; give more bits")
    document = json.loads(report.read_text())
    assert not document["passed"]
    assert document["reason"].startswith("--min-sqnr 90: the emitted model has ")
    assert document["distortion"]["sqnr_db"] < 90
    output.unlink()
    arguments = [CNN, output, *FEW, "--effort", "fast", "--max-bytes", "3kB", "--json", report]
    refused(main, arguments, output, 4, "--max-bytes 3000: the emitted model has ", " bytes; give fewer bits")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("-", "-: cannot write to standard output; give the path of a file"),
        ("none_such/out.onnx", "its folder none_such does not exist; create it first"),
        ("folder", "is a folder; give the path of a file"),
        ("/proc/none_such.onnx", "cannot be written"),
        ("/dev/null", "is a device or pipe; give the path of a file"),
        ("x" * 300, "is not a usable path"),
    ],
    ids=["standard output", "no folder", "a folder", "proc", "device", "long name"],
)
def test_unwritable_output(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, said: str) -> None:
    if output.startswith("/") and not Path(output).parent.is_dir():
        pytest.skip(f"no {Path(output).parent} here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    run = main(CNN, output, *FEW)
    assert (run.code, run.out) == (2, "")
    assert output in run.error
    assert said in run.error
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("option", ["--json", "--modified", "--report"])
def test_unwritable_side_output(main: Main, tmp_path: Path, option: str) -> None:
    output = tmp_path / "out.onnx"
    arguments = [CNN, output, *FEW, option, tmp_path / "none_such" / "f"]
    refused(main, arguments, output, 2, "does not exist; create it first")


def test_a_link_as_output_stays_and_its_target_is_replaced(main: Main, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "real.onnx", tmp_path / "out.onnx"
    link.symlink_to(Path("store") / "real.onnx")
    for before in (None, BEFORE):
        if before is not None:
            target.write_bytes(before)
        assert main(CNN, link, *FEW, "--effort", "fast").code == 0
        assert link.is_symlink()
        assert not target.is_symlink()
        onnx.checker.check_model(target)
    link.unlink()
    link.symlink_to(link)
    assert "is not a usable path" in main(CNN, link, *FEW).error


@pytest.mark.parametrize(
    "options",
    [
        ["--weight-bits", "0"],
        ["--size", "1B"],
        ["--layer-limit", "1B"],
        ["--widths", "4-8", "--weight-bits", "5", "--activation-bits", "none", "--effort", "default"],
        ["--effort", "best"],
    ],
    ids=" ".join,
)
def test_options_at_their_ends(main: Main, tmp_path: Path, options: list[str]) -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 3] y)
        { a = MatMul (x, w) b = Relu (a) c = MatMul (b, v) y = Softmax (c) }""")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 4)), ("v", (4, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "in.onnx")
    np.save(tmp_path / "x.npy", rng.standard_normal((64, 4)).astype(np.float32))
    chosen = ["--effort", "fast", *options, "--report", tmp_path / "out.html", "--threads", "1", "--verbose"]
    run = main(tmp_path / "in.onnx", tmp_path / "out.onnx", "--calibration", tmp_path / "x.npy", *chosen)
    assert run.code == 0, run.err
    assert "output SQNR" in run.out
    onnx.checker.check_model(tmp_path / "out.onnx")


def test_nothing_is_written_before_all_figures_are_made(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("rdoq_onnx.report.advice.advise", broken)
    output, report = tmp_path / "out.onnx", tmp_path / "out.json"
    with pytest.raises(ZeroDivisionError):
        main(CNN, output, *FEW, "--effort", "fast", "--json", report)
    assert not output.exists()
    assert not report.exists()


@pytest.mark.parametrize(("option", "shown"), [("--verbose", True), ("--quiet", False)])
def test_failure_of_the_users_function(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, shown: bool
) -> None:
    (tmp_path / "feeds_that_fail.py").write_text("def feeds():\n    yield {}['absent']\n")
    monkeypatch.chdir(tmp_path)
    run = main(CNN, "out.onnx", "--calibration", "feeds_that_fail:feeds", option)
    assert run.code == 2
    last = run.err.splitlines()[-1]
    assert last.startswith("rdoq-onnx: error: feeds_that_fail:feeds: failed with KeyError: 'absent'; fix it")
    assert ("Traceback" in run.err) is shown
    assert ('feeds_that_fail.py", line 2' in run.err) is shown
    assert "rdoq_onnx/" not in run.err.replace(str(tmp_path), "")


def test_no_output_may_replace_an_input_or_another_output(main: Main, tmp_path: Path) -> None:
    model, samples, link = tmp_path / "in.onnx", tmp_path / "samples.npz", tmp_path / "link.onnx"
    model.write_bytes(CNN.read_bytes())
    samples.write_bytes(CALIBRATION.read_bytes())
    link.symlink_to(model)
    other = tmp_path / "out.onnx"
    same = "output and input are the same file; give another output path"
    for arguments, said in [
        ([model, model], same),
        ([model, link], same),
        ([link, model], same),
        ([model, other, "--modified", link], same),
        ([model, other, "--json", model], same),
        ([model, samples], "is the --calibration file; give another output path"),
        ([model, other, "--json", tmp_path / "." / "out.onnx"], "must be different files"),
    ]:
        run = main(*arguments, "--calibration", samples)
        assert (run.code, run.out) == (2, "")
        assert said in run.error
        assert model.read_bytes() == CNN.read_bytes()
        assert samples.read_bytes() == CALIBRATION.read_bytes()
        assert link.is_symlink()
        assert not other.exists()


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is here")
def test_provider_that_is_not_there(main: Main, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    refused(main, [CNN, output, *FEW, "--provider", "cuda"], output, 2, "error: --provider cuda: ", "--provider cpu")


def test_missing_onnxruntime(tmp_path: Path) -> None:
    """A stub in front of the real one, whose import fails as if there were none."""
    stub = tmp_path / "stub" / "onnxruntime.py"
    stub.parent.mkdir()
    stub.write_text("raise ModuleNotFoundError('No module named onnxruntime', name='onnxruntime')\n")
    run = spawn(CNN, "out.onnx", *FEW, cwd=tmp_path, env={"PYTHONPATH": str(stub.parent)})
    assert run.code == 2
    assert "ONNX Runtime is not installed" in run.error
    assert "rdoq-onnx[cpu]" in run.error
    assert "rdoq-onnx[gpu]" in run.error
    assert not (tmp_path / "out.onnx").exists()


def test_bad_input_to_a_process_of_its_own(tmp_path: Path) -> None:
    run = spawn("none_such.onnx", "out.onnx", cwd=tmp_path)
    assert (run.code, run.out) == (2, "")
    assert run.error.startswith("rdoq-onnx: error: none_such.onnx: cannot be read")
    assert list(tmp_path.iterdir()) == []


def test_control_c(tmp_path: Path) -> None:
    """Interrupted once the steps have begun: 130, no traceback, no file."""
    slow = ("--measure", "probe", "--calibration", CALIBRATION)
    command = [sys.executable, "-m", "rdoq_onnx", CNN, "out.onnx", *slow]
    # A shell that runs the tests in the background has its children ignore the signal.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        begun = next(line for line in process.stderr if "candidates" in line)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate()
    assert process.returncode == 130, begun
    assert rest.split() == ["rdoq-onnx:", "interrupted"]
    assert list(tmp_path.iterdir()) == []
