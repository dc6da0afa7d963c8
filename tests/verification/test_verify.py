"""The last gate: the emitted file must do what the report says, or the run fails."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rdoq_onnx.api import allocate, measure
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import input_specs
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.system.io import read_model
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.targets import TARGETS
from rdoq_onnx.verification import verify as verify_module
from rdoq_onnx.verification.verify import verify
from rdoq_onnx.verification.widths import check_widths
from tests.conftest import ROOT

PATH = ROOT / "models" / "digits_cnn.onnx"
RUNTIME = Runtime("cpu", 1)


@pytest.fixture(scope="module")
def images():
    with np.load(ROOT / "models" / "digits_test.npz") as data:
        pixels = data["x"][::50].astype(np.float32).transpose(0, 3, 1, 2) / 255
    with np.load(ROOT / "models" / "digits_calib.npz") as data:
        return (pixels - data["mean"].astype(np.float32).item()) / data["std"].astype(np.float32).item()


@pytest.fixture(scope="module")
def case(images):
    """(original, emitted, allocation, samples not used for measuring)"""
    original = read_model(PATH)
    allocation = allocate(measure(original, {"input": images[:8]}, threads=1), bits=5)
    samples = load_samples({"input": images[8:]}, input_specs(original), None)
    return original, emit_model(allocation, {}, "int8", keep_channels=True), allocation, samples


def copy(model):
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def edit_integers(emission, layer, change):
    """Return the emission with the integers of one layer's weight changed in place by `change`."""
    result = copy(emission.model)
    nodes = {n.name: n for n in result.graph.node}
    producer = {o: n for n in result.graph.node for o in n.output}
    name = producer[nodes[layer.name].input[layer.linear.weight_side]].input[0]
    tensor = next(t for t in result.graph.initializer if t.name == name)
    integers = numpy_helper.to_array(tensor).copy()
    change(layer.linear.rows(integers) if layer.linear.axis == 0 else integers)
    tensor.CopyFrom(numpy_helper.from_array(integers, name))
    return replace(emission, model=result)


def test_figures_are_those_of_the_emitted_file(case, ort_run):
    original, emitted, allocation, samples = case
    found = verify(emitted, allocation, Reference(original, allocation.measurement, samples, RUNTIME))
    feeds = samples.feeds(slice(None))
    expected, got = (ort_run(m, feeds, "all")[0].astype(np.float64) for m in (original, emitted.model))
    assert found.samples == len(samples) == 12
    assert found.measured == pytest.approx(np.mean((got - expected) ** 2), rel=0.02)
    sqnr = 10 * np.log10(np.sum(expected**2) / np.sum((got - expected) ** 2))
    assert found.sqnr_db == pytest.approx(sqnr, abs=0.1)
    assert found.level_gap < 0.5 * found.measured
    assert found.kernels["QLinearConv"] >= 8


def test_emitted_integers_fit_their_widths(case):
    _, emitted, allocation, _ = case
    check_widths(emitted, allocation, RUNTIME)
    for storage in ("packed", "native"):
        check_widths(emit_model(allocation, {}, storage), allocation, RUNTIME)


@pytest.mark.parametrize("index", [0, -1])
def test_an_integer_outside_its_width(case, index):
    original, emitted, allocation, samples = case
    layer, bits = allocation.measurement.network.layers[index], allocation.layer_bits[index]
    unit = int(np.argmin(bits))

    def push(rows):
        row = rows[unit] if layer.linear.axis == 0 else rows[:, unit]
        row[0] = min(row.min() + 2 ** bits[unit], 127)

    tampered = edit_integers(emitted, layer, push)
    message = rf"layer '{layer.name}', channel {unit}: .*{bits[unit]} bits allocated"
    with pytest.raises(VerificationError, match=message):
        check_widths(tampered, allocation, RUNTIME)
    with pytest.raises(VerificationError, match="bits allocated"):
        verify(tampered, allocation, Reference(original, allocation.measurement, samples, RUNTIME))


def test_a_0_bit_channel_must_be_zero(case):
    _, emitted, allocation, _ = case
    layer = allocation.measurement.network.layers[0]
    claimed = replace(allocation, layer_bits=(np.zeros_like(allocation.layer_bits[0]), *allocation.layer_bits[1:]))
    with pytest.raises(VerificationError, match=rf"layer '{layer.name}', channel 0: \d+ levels in the file, 0 bits"):
        check_widths(emitted, claimed, RUNTIME)


def test_a_file_that_does_not_load(case):
    original, emitted, allocation, samples = case
    broken = copy(emitted.model)
    node = next(n for n in broken.graph.node if n.op_type == "QuantizeLinear")
    node.input[1] = "missing"
    with pytest.raises(VerificationError, match="the emitted model does not run"):
        verify(
            replace(emitted, model=broken), allocation, Reference(original, allocation.measurement, samples, RUNTIME)
        )


def test_a_file_with_outputs_that_are_not_finite(case):
    original, emitted, allocation, samples = case
    broken = copy(emitted.model)
    last = [n for n in broken.graph.node if n.op_type == "QuantizeLinear"][-1].input[1]
    scale = next(t for t in broken.graph.initializer if t.name == last)
    scale.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(scale), np.nan), last))
    with pytest.raises(VerificationError, match="not finite"):
        verify(
            replace(emitted, model=broken), allocation, Reference(original, allocation.measurement, samples, RUNTIME)
        )


def test_a_level_whose_kernels_compute_something_else(case, monkeypatch):
    """Saturation of 8-bit weights on CPUs without VNNI, simulated in the file since this CPU may have VNNI."""
    original, emitted, allocation, samples = case
    layer = allocation.measurement.network.layers[0]
    saturating = edit_integers(emitted, layer, lambda rows: np.clip(rows, -4, 4, out=rows))
    load = Runtime.session
    for level in ("all", "basic"):
        monkeypatch.setattr(
            Runtime,
            "session",
            lambda self, model, at="all", wrong=level: load(
                self, saturating.model if model is emitted.model and at == wrong else model, at
            ),
        )
        with pytest.raises(VerificationError, match=r"has -?\d+\.\d dB at ONNX Runtime's (default|BASIC) level"):
            verify(emitted, allocation, Reference(original, allocation.measurement, samples, RUNTIME))


def test_a_runtime_whose_outputs_have_other_shapes(case, monkeypatch):
    """As OpenVINO computes GroupQueryAttention with empty caches."""
    original, emission, allocation, samples = case

    def load():
        return lambda feeds, names: [np.zeros((len(feeds["input"]), 0), np.float32)], None

    measurement = allocation.measurement
    network = replace(measurement.network, target=TARGETS["openvino"])
    aimed = replace(allocation, measurement=replace(measurement, network=network))
    monkeypatch.setattr(verify_module, "openvino_runs", lambda model, threads: {"OpenVINO": load})
    with pytest.raises(VerificationError, match=r"'logits' has the shape \[\d+, 0\] in OpenVINO and \[\d+, 10\]"):
        verify(emission, aimed, Reference(original, aimed.measurement, samples, RUNTIME))


def test_one_session_is_in_memory_at_a_time(case, monkeypatch):
    """Together they may not fit."""
    original, emitted, allocation, samples = case
    reference = Reference(original, allocation.measurement, samples, RUNTIME).kept(Steps(Store(), Progress(), "test"))
    load, alive, most = Runtime.session, weakref.WeakSet(), []

    def counted(self, model, level="basic"):
        gc.collect()
        most.append(len(alive))
        session = load(self, model, level)
        alive.add(session.handle)
        return session

    list(reference.batches())  # its own session runs the float network
    monkeypatch.setattr(Runtime, "session", counted)
    verify(emitted, allocation, reference)
    assert len(most) >= 4
    assert max(most) <= 1


def test_large_outputs_go_to_the_scratch_folder(case, monkeypatch, tmp_path):
    original, emitted, allocation, samples = case
    expected = verify(emitted, allocation, Reference(original, allocation.measurement, samples, RUNTIME))
    monkeypatch.setattr(verify_module, "FLOAT_MEMORY", 0)
    allocation = replace(allocation, measurement=replace(allocation.measurement, scratch=Scratch(tmp_path)))
    found = verify(emitted, allocation, Reference(original, allocation.measurement, samples, RUNTIME))
    assert [p.name for folder in tmp_path.iterdir() for p in folder.glob("verify-*.npy")]
    assert replace(found, powers=None) == replace(expected, powers=None)
    np.testing.assert_array_equal(found.powers.noise, expected.powers.noise)
