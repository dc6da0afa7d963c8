"""Networks measured one layer at a time: as good as all at once, resumable, the same for any memory and threads."""

import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import api, pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.curves import large
from rdoq_onnx.curves.layerwise import Layerwise
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.gradients import reverse
from rdoq_onnx.gradients.tape import RULES
from rdoq_onnx.model import external
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.scratch import Scratch
from tests.conftest import ROOT

MODELS = ROOT / "models"
IN_PARTS = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4, 8, 8] x) => (float[N, 6] y) {
    a = Conv <pads = [1, 1, 1, 1], group = 2> (x, w1) b = Relu (a)
    c = ConvTranspose <strides = [2, 2], group = 2> (b, w2) d = Relu (c)
    e = Conv <group = 6, strides = [2, 2]> (d, w3) f = Relu (e)
    p = GlobalAveragePool (f) q = Flatten (p) y = MatMul (q, w4) }"""
SHAPES = {"w1": (8, 2, 3, 3), "w2": (8, 3, 2, 2), "w3": (6, 1, 3, 3), "w4": (6, 6)}


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch):
    monkeypatch.setattr(large, "LARGE", 1)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Return the path of a network with groups, and of samples."""
    folder, rng = tmp_path_factory.mktemp("grouped"), np.random.default_rng(0)
    model = parser.parse_model(IN_PARTS)
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) * 0.4, n) for n, s in SHAPES.items()
    )
    onnx.save(model, folder / "model.onnx")
    np.save(folder / "x.npy", rng.standard_normal((40, 4, 8, 8)).astype(np.float32))
    return folder / "model.onnx", folder / "x.npy"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Return the path of a decoder with two layers, and of samples."""
    folder = tmp_path_factory.mktemp("decoder")
    benchmarks = str(ROOT / "tests" / "benchmarks")
    sys.path.append(benchmarks)
    networks = import_module("networks")
    shape = networks.Decoder(layers=2, width=64, hidden=176, heads=4, kv_heads=2, vocabulary=160)
    networks.write(shape, folder / "model.onnx")
    networks.samples_of(shape, folder / "calib.npz", 24, 16)
    sys.path.remove(benchmarks)
    return folder / "model.onnx", folder / "calib.npz"


@pytest.fixture
def files(request):
    """Return the path of the model that a test names, and of its samples."""
    if request.param in ("digits_vit", "digits_cnn"):
        return MODELS / f"{request.param}.onnx", MODELS / "digits_calib.npz"
    return request.getfixturevalue(request.param)


class Run:
    """A fast run through the pipeline, with the layers that it compensated and the steps that it took."""

    def __init__(self, files, curves=None, **settings):
        settings = {"threads": 1, "effort": "fast", "weight_bits": 4, "activation_bits": None} | settings
        result = pipeline.run(*files, Config(**settings), Progress(), curves)
        del result.model.metadata_props[:]  # the settings
        self.report, self.data = result.report, external.attached(result.model).SerializeToString()
        self.measurement = result.allocation.measurement
        self.steps = set(result.report.seconds)


@pytest.mark.parametrize(
    ("files", "activation_bits", "loss"),
    [
        ("digits_vit", None, 1.5),
        ("digits_cnn", None, 1),
        ("decoder", 8, 1),
    ],
    indirect=["files"],
)
def test_is_as_good_as_all_layers_at_once(files, monkeypatch, activation_bits, loss):
    found = Run(files, threads=2, activation_bits=activation_bits)
    assert "rounding" in found.steps
    monkeypatch.setattr(large, "LARGE", 1 << 40)
    expected = Run(files, threads=2, activation_bits=activation_bits)
    assert "rounding" not in expected.steps
    assert found.report.sqnr_db > expected.report.sqnr_db - loss


@pytest.fixture
def interrupted(monkeypatch):
    """Return what lets the next run compensate `count` layers, and stops it before the next one."""
    compensate = Layerwise.compensate

    def after(count):
        done = []

        def stop(self, index, block, wanted):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(index)
            compensate(self, index, block, wanted)

        monkeypatch.setattr(Layerwise, "compensate", stop)

    return after


@pytest.fixture
def written(monkeypatch):
    """Return a list of the names of arrays written to scratch folders."""
    names, put = [], Scratch.put
    monkeypatch.setattr(Scratch, "put", lambda self, name, array: (names.append(name), put(self, name, array))[1])
    return names


STATISTICS = ("mean", "covariance", "sensitivity", "basis", "powers")


def kinds(names):
    return {name.split("-")[-2] for name in names if "-" in name}


@pytest.mark.parametrize("count", [0, 2])
def test_an_interrupted_run_continues(grouped, tmp_path, interrupted, written, count):
    fresh = Run(grouped, tmp_path / "fresh.curves")
    interrupted(count)
    with pytest.raises(KeyboardInterrupt):
        Run(grouped, tmp_path / "c.curves")
    interrupted(1 << 20)
    assert kinds(written) >= {"covariance", "powers", "state", "codes"}
    written.clear()
    resumed = Run(grouped, tmp_path / "c.curves")
    assert resumed.data == fresh.data
    assert kinds(written) == {"codes", "scales", "state"}
    assert len(written) == 3 * (len(SHAPES) - count)
    written.clear()
    again = Run(grouped, tmp_path / "c.curves")
    assert again.data == fresh.data
    assert not written
    assert "moments" not in again.steps
    other = Run(grouped, tmp_path / "c.curves", weight_bits=3)
    assert other.data == Run(grouped, tmp_path / "fresh.curves", weight_bits=3).data


def test_a_folder_of_another_measurement_is_emptied(grouped, tmp_path, written):
    Run(grouped, tmp_path / "c.curves")
    names = {p.name for p in (tmp_path / "c.curves.data").glob("*.npy")}
    assert names
    written.clear()
    with pytest.raises(ConfigError, match="--seed 0, not 1"):
        Run(grouped, tmp_path / "c.curves", seed=1)
    assert {p.name for p in (tmp_path / "c.curves.data").glob("*.npy")} == names  # the file refuses: it is still of use
    (tmp_path / "c.curves").unlink()
    assert Run(grouped, tmp_path / "c.curves", seed=1).data == Run(grouped, tmp_path / "fresh.curves", seed=1).data
    assert kinds(written) >= set(STATISTICS) - {"sensitivity"}


def test_a_missing_folder_is_reported(grouped, tmp_path):
    Run(grouped, tmp_path / "c.curves")
    for path in (tmp_path / "c.curves.data").iterdir():
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"c\.curves: its folder .*c\.curves\.data is incomplete; delete both"
    ) as caught:
        Run(grouped, tmp_path / "c.curves")
    assert "\n" not in str(caught.value)


def compensated(run):
    """Return which channels were compensated at each width by `run`, [channels, widths]."""
    masks, keep = {}, Layerwise._keep
    with pytest.MonkeyPatch.context() as patch:

        def watched(self, layer, block, codes, state):
            masks[layer.name, block] = state.compensated
            keep(self, layer, block, codes, state)

        patch.setattr(Layerwise, "_keep", watched)
        run()
    return np.concatenate(list(masks.values()))


def test_one_budget_compensates_the_widths_around_it(grouped, monkeypatch):
    around = []
    near = large._near

    def watched(layerwise, measurement, allocate):
        return near(layerwise, measurement, lambda m: around.append(allocate(m)[1][: m.channels]) or allocate(m))

    monkeypatch.setattr(large, "_near", watched)
    found = compensated(lambda: Run(grouped))
    wanted = np.zeros_like(found)
    for bits in around:
        distance = np.abs(np.arange(9) - bits[:, None])
        column = np.arange(len(bits)), bits
        layers = np.split(np.arange(len(bits)), np.cumsum([8, 3, 6]))
        coarse = [u for u in layers if not (wanted[column] | (bits == 0))[u].all()]
        for units in coarse:
            new = ~(wanted[column] | (bits == 0))[units] if wanted[units].any() else np.ones(len(units), bool)
            wanted[units] |= (distance[units] <= large.REACH) & new[:, None]
    wanted[:, 0] = False
    np.testing.assert_array_equal(found, wanted)
    assert not found[:, 1:].all()


@pytest.mark.parametrize("kind", ["curves", "goal", "api"])
def test_other_budgets_to_come_need_all_widths(grouped, tmp_path, kind):
    runs = {
        "curves": lambda: Run(grouped, tmp_path / "c.curves"),
        "goal": lambda: Run(grouped, sqnr=15.0),
        "api": lambda: api.measure(*grouped, threads=1, effort="fast", weights_only=True),
    }
    assert compensated(runs[kind])[:, 1:].all()


def test_blocks_have_codes_only_where_they_are_chosen(decoder):
    measurement = Run(decoder, weight_bits=5, block_size=(16, 32)).measurement
    layers = [x for x in measurement.layers if x.layer in measurement.network.layers]
    assert len(layers) > 10
    assert {x.block for x in layers} <= {16, 32}
    for each in layers:
        assert {o.size for o in each.options} <= {16, each.block}
        codes, linear = each.codes[4], each.layer.linear
        assert codes.scales.shape == (linear.channels, linear.inputs // each.block)
        assert codes.values.shape == (linear.channels, linear.inputs)


def test_a_checkpoint_keeps_all_block_sizes(decoder, tmp_path):
    first = Run(decoder, tmp_path / "c.curves", weight_bits=5)
    again = Run(decoder, tmp_path / "c.curves", weight_bits=5)
    assert "moments" not in again.steps
    assert again.data == first.data
    assert {o.size for x in again.measurement.layers for o in x.options} >= {0, 32}


def test_other_budgets_to_come_need_all_block_sizes(decoder):
    measurement = api.measure(*decoder, threads=1, effort="fast", weights_only=True, block_size="0,32", samples=12)
    assert {o.size for x in measurement.layers for o in x.options} == {0, 32}
    allocations = [api.allocate(measurement, weight_bits=b) for b in (3, 6)]
    assert all(a.weight_average <= b for a, b in zip(allocations, (3, 6), strict=True))


def test_several_budgets_need_all_widths(grouped):
    job = pipeline.Job.of(*grouped, Config(threads=1, effort="fast", activation_bits=None), Progress())
    assert job._around(Config()) is not None
    assert replace(job, single=False)._around(Config()) is None


def test_memory_and_threads_change_no_byte(grouped):
    first = Run(grouped)
    assert Run(grouped, memory=300_000_000).data == first.data
    assert Run(grouped, threads=2).data == first.data


def test_a_large_layer_is_divided_between_threads(grouped, monkeypatch):
    first = Run(grouped)
    monkeypatch.setattr(large, "_ALONE", 1)
    monkeypatch.setattr("rdoq_onnx.curves.layer_work._TOGETHER", 20)
    assert Run(grouped, threads=2).data == first.data


def test_layers_without_an_adjoint_are_measured_exactly_as_a_whole(grouped, monkeypatch, written):
    """ConvTranspose passes nothing back: the first layer has no adjoint."""
    expected = Run(grouped)
    monkeypatch.setitem(RULES, "ConvTranspose", lambda tape, node, grads: NotImplemented)
    monkeypatch.setattr(reverse, "foreign", lambda tape, node, grads: None)
    written.clear()
    found = Run(grouped)
    assert found.report.probed
    assert "gain" in kinds(written)
    assert found.report.sqnr_db > expected.report.sqnr_db - 1.5


@pytest.fixture
def detaching(monkeypatch):
    """Let tensors of a few bytes count as large, in files and on the shelf."""
    for name in ("rdoq_onnx.model.external", "rdoq_onnx.system.io"):
        monkeypatch.setattr(f"{name}.DETACHED", 1)
        monkeypatch.setattr(f"{name}.LARGE", 100)


def test_detached_weights_change_no_byte(grouped, tmp_path, request):
    expected = Run(grouped, tmp_path / "plain.curves", activation_bits=8)
    request.getfixturevalue("detaching")
    assert Run(grouped, tmp_path / "c.curves", activation_bits=8).data == expected.data
    assert list((tmp_path / "c.curves.data").glob("*.weights"))
    # The other regime equalizes other weights, which must not replace those that the first one refers to.
    assert Run(grouped, tmp_path / "c.curves", activation_bits=4).report.sqnr_db > 5
    again = Run(grouped, tmp_path / "c.curves", activation_bits=8)
    assert "observe" not in again.steps
    assert again.data == expected.data


def test_a_model_in_memory_is_that_of_its_measurement_when_it_is_detached(grouped, request):
    request.getfixturevalue("detaching")
    model = onnx.load(grouped[0])
    measured = api.measure(model, grouped[1], threads=1, effort="fast", weights_only=True)
    emitted = api.emit(model, api.allocate(measured, weight_bits=4))
    onnx.checker.check_model(emitted, full_check=True)
    assert not any(t.external_data for t in emitted.graph.initializer)


def test_a_checkpoint_and_its_model_can_move(grouped, tmp_path, request):
    request.getfixturevalue("detaching")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    model = onnx.load(grouped[0])
    onnx.save(model, old / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    first = Run((old / "model.onnx", grouped[1]), old / "c.curves", activation_bits=8)
    old.rename(new)
    again = Run((new / "model.onnx", grouped[1]), new / "c.curves", activation_bits=8)
    assert "observe" not in again.steps
    assert again.data == first.data
