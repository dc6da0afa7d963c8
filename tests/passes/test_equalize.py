"""Moving channel scales from one layer to the next changes weights, not outputs."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.equalize import Equalize
from tests.conftest import deviation

FACTORS = np.array([0.5, 2.0, 1.0, 4.0])
LAYERS = {
    "convolutions": (
        "[one] a = Conv (x, w, b) c = Relu (a) [two] y = Conv (c, v)",
        {"w": (4, 3, 1, 1), "b": (4,), "v": (5, 4, 3, 3)},
        (2, 3, 6, 6),
    ),
    "a grouped convolution behind": (
        "[one] a = Conv (x, w) c = Relu (a) [two] y = Conv <group = 2> (c, v)",
        {"w": (4, 3, 1, 1), "v": (6, 2, 3, 3)},
        (2, 3, 6, 6),
    ),
    "matrices": (
        "[one] a = Gemm (x, w, b) c = Relu (a) [two] y = Gemm <transB = 1> (c, v)",
        {"w": (3, 4), "b": (4,), "v": (5, 4)},
        (2, 3),
    ),
}


def model_of(nodes, shapes, shape):
    dims = ", ".join(map(str, shape))
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[{dims}] x) => (float[{", ".join("NMHW"[: len(shape)])}] y) {{ {nodes} }}""")
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(size).astype(np.float32) for name, size in shapes.items()}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model, {"x": rng.standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_outputs_stay(ort_run, kind):
    model, feeds = model_of(*LAYERS[kind])
    scaled = run_passes([Equalize({"one": FACTORS}, {"two": FACTORS}, {})], model)
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, scaled))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert deviation(ort_run(scaled, feeds), ort_run(model, feeds)) < 1e-6


def test_the_outputs_of_a_layer_have_its_factors(ort_run):
    model, feeds = model_of("[one] y = Conv (x, w, b)", {"w": (4, 3, 1, 1), "b": (4,)}, (2, 3, 6, 6))
    scaled = run_passes([Equalize({"one": FACTORS}, {}, {})], model)
    (before,), (after,) = (ort_run(m, feeds) for m in (model, scaled))
    np.testing.assert_allclose(after, before * FACTORS.reshape(4, 1, 1), rtol=1e-5, atol=1e-6)


def test_each_channel_of_a_clip_gets_its_own_ceiling(ort_run):
    nodes, shapes, shape = LAYERS["convolutions"]
    model, feeds = model_of(nodes.replace("c = Relu (a)", "[cap] c = Clip (a, low, high)"), shapes, shape)
    bounds = {"low": 0.0, "high": 0.4}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v, np.float32), k) for k, v in bounds.items())
    step = Equalize({"one": FACTORS}, {"two": FACTORS}, {"cap": FACTORS.reshape(4, 1, 1)})
    scaled = run_passes([step], model)
    assert [n.op_type for n in scaled.graph.node] == ["Conv", "Relu", "Min", "Conv"]
    assert deviation(ort_run(scaled, feeds), ort_run(model, feeds)) < 1e-6
