"""F̃ is F at s = 0, to the last bit; a perturbation fed to an Add is the perturbation of the weight or activation."""

import numpy as np
import onnx
import pytest
from onnx import checker, numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import modified
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ModelError
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_adds import InsertAdds, parameter
from rdoq_onnx.system.io import read_model
from tests.conftest import ROOT, deviation, feeds_for, real_models

SMALL = [ROOT / "models" / name for name in ("digits_cnn.onnx", "digits_vit.onnx")]


def analysed(path):
    return analyse(run_passes(NORMALIZE, read_model(path)), Config().selection)


def expect_same(ort_run, network, feeds, level):
    changed = modified(network)
    expected = ort_run(network.model, feeds, level)
    for got, value in zip(ort_run(changed, feeds, level), expected, strict=True):
        np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("level", ["none", "basic"])
@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_bundled_models_unchanged_at_zero(ort_run, path, level):
    network = analysed(path)
    feeds = {"input": np.random.default_rng(0).standard_normal((3, 1, 28, 28), np.float32)}
    expect_same(ort_run, network, feeds, level)


@pytest.mark.parametrize("path", [p for p in real_models() if p.values[0] not in SMALL])
def test_zoo_unchanged_at_zero(ort_run, path):
    model = run_passes(NORMALIZE, read_model(path))
    try:
        network = analyse(model, Config().selection)
    except ModelError as error:
        pytest.skip(str(error))
    feeds = feeds_for(path, network.model)
    expect_same(ort_run, network, feeds, "none")
    # At BASIC, ONNX Runtime fuses a MatMul and the Add after it into one Gemm, but not across an Add of F̃.
    assert deviation(ort_run(modified(network), feeds, "basic"), ort_run(network.model, feeds, "basic")) < 1e-6


def test_an_add_per_activation_and_layer():
    network = analysed(SMALL[0])
    changed = modified(network)
    checker.check_model(changed, full_check=True)
    adds = [n for n in changed.graph.node if n.name.startswith("add_")]
    assert len(changed.graph.node) == len(network.model.graph.node) + len(adds)
    names = [parameter("a", a.tensor) for a in network.activations]
    names += [parameter("z", layer.uses[0].output) for layer in network.layers]
    assert sorted(n.input[1] for n in adds) == sorted(names)
    # Optional inputs that default to zeros, so that the file runs without them.
    assert {i.name for i in changed.graph.input} == {"input", *names}
    defaults = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}
    assert not any(defaults[n].any() for n in names)


TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y, float[N, 5, 6, 6] z)
{ [first] z = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) a = Relu (z) [second] y = Conv (a, w2) }"""


@pytest.fixture
def chain():
    model = parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (5, 3, 3, 3)), ("b1", (5,)), ("w2", (4, 5, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return run_passes(NORMALIZE, model), rng.standard_normal((2, 3, 6, 6), np.float32), rng


def test_parameters_broadcast_or_take_the_whole_shape(ort_run, chain):
    model, x, rng = chain
    changed = run_passes([InsertAdds(["a"], [])], model)
    weight = numpy_helper.to_array(model.graph.initializer[2])[:, :, 0, 0]
    reference = ort_run(model, {"x": x})[0]
    for shape in ((1, 1, 1, 1), (1, 5, 1, 1), (2, 5, 6, 6)):
        s = rng.standard_normal(shape, np.float32)
        (y, _) = ort_run(changed, {"x": x, "s_a/a": s})
        moved = np.einsum("oc,nchw->nohw", weight, np.broadcast_to(s, (2, 5, 6, 6)))
        np.testing.assert_allclose(y, reference + moved, rtol=1e-4, atol=1e-4)


def test_add_after_a_layer_reaches_the_graph_output(ort_run, chain):
    model, x, rng = chain
    changed = run_passes([InsertAdds([], ["z", "y"])], model)
    assert [o.name for o in changed.graph.output] == ["y", "z"]
    s = rng.standard_normal((2, 4, 6, 6), np.float32)
    y, z = ort_run(model, {"x": x})
    moved = ort_run(changed, {"x": x, "s_z/y": s})
    np.testing.assert_allclose(moved[0], y + s, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(moved[1], z)
    bias = rng.standard_normal((1, 5, 1, 1), np.float32)
    np.testing.assert_array_equal(ort_run(changed, {"x": x, "s_z/z": bias})[1], z + bias)


def test_add_after_an_activation_does_not_change_the_graph_output(ort_run, chain):
    model, x, rng = chain
    changed = run_passes([InsertAdds(["z"], [])], model)
    s = rng.standard_normal((2, 5, 6, 6), np.float32)
    y, z = ort_run(changed, {"x": x, "s_a/z": s}, "none")
    expected_y, expected_z = ort_run(model, {"x": x}, "none")
    np.testing.assert_array_equal(z, expected_z)
    assert deviation([y], [expected_y]) > 0.1


def test_both_kinds_after_one_tensor(ort_run, chain):
    """The layer's Add feeds the activation's Add."""
    model, x, rng = chain
    changed = run_passes([InsertAdds(["z"], ["z"])], model)
    s, t = rng.standard_normal((2, 2, 5, 6, 6), np.float32)
    y, z = ort_run(changed, {"x": x, "s_z/z": s, "s_a/z": t})
    _, before = ort_run(model, {"x": x})
    np.testing.assert_allclose(z, before + s, rtol=1e-5, atol=1e-5)
    weight = numpy_helper.to_array(model.graph.initializer[2])[:, :, 0, 0]
    expected = np.einsum("oc,nchw->nohw", weight, np.maximum(before + s + t, 0))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_perturbed_output_channel_is_a_changed_weight_channel(ort_run):
    """Eq. 2: Δz = op(x, ΔW) on one channel, for each layer of a real model."""
    network = analysed(SMALL[0])
    changed = modified(network)
    rng = np.random.default_rng(1)
    feeds = {"input": rng.standard_normal((2, 1, 28, 28), np.float32)}
    tensors = {t.name: k for k, t in enumerate(network.model.graph.initializer)}
    inner = onnx.ModelProto()
    inner.CopyFrom(network.model)
    inner.graph.output.extend(onnx.ValueInfoProto(name=u.data) for x in network.layers for u in x.uses)
    values = dict(zip([o.name for o in inner.graph.output], ort_run(inner, feeds, "none"), strict=True))
    reference = ort_run(network.model, feeds, "none")
    for layer in network.layers:
        weight = numpy_helper.to_array(network.model.graph.initializer[tensors[layer.weight]])
        rows = layer.linear.rows(weight)
        delta = np.zeros_like(rows)
        unit = int(rng.integers(len(rows)))
        delta[unit] = 0.3 * rng.standard_normal(rows.shape[1]) * rows.std()
        (use,) = layer.uses
        x = values[use.data]
        blocks = layer.linear.grouped(delta) @ layer.uses[0].linear.unfold(x, 2)
        shape = output_shape(ort_run, network.model, use.output, feeds)
        moved = ort_run(changed, feeds | {parameter("z", use.output): layer.linear.refold(blocks, shape)}, "none")
        other = onnx.ModelProto()
        other.CopyFrom(network.model)
        other.graph.initializer[tensors[layer.weight]].CopyFrom(
            numpy_helper.from_array(layer.linear.tensor(rows + delta), layer.weight)
        )
        expected = ort_run(other, feeds, "none")
        assert deviation(moved, expected) < 1e-5
        assert deviation(expected, reference) > 1e-4


def output_shape(ort_run, model, name, feeds):
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(onnx.ValueInfoProto(name=name))
    return ort_run(probe, feeds, "none")[-1].shape


def test_names_already_in_use():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[2] x) => (float[2] y) { t = Relu (x) a = Neg (t) y = Relu (a) }""")
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "s_a/a"
    changed = run_passes([InsertAdds(["a"], [])], model)
    assert [i.name for i in changed.graph.input] == ["x", "s_a/a_1"]
