"""HardSwish between quantizers becomes a product of integers: the same numbers, one kernel."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.integer_hard_swish import IntegerHardSwish
from rdoq_onnx.system.runtime import Runtime

NODES = """q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) h = HardSwish (d)
    r = QuantizeLinear (h, t, u) y = DequantizeLinear (r, t, u)"""


def parse(scale, zero_point, kind=np.uint8, nodes=NODES):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) {{ {nodes} }}')
    values = {"s": np.float32(scale), "z": kind(zero_point), "t": np.float32(0.04), "u": np.uint8(12)}
    used = {i for node in model.graph.node for i in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in values.items() if n in used)
    return model


def ops(model):
    return [n.op_type for n in model.graph.node]


FEEDS = {"x": np.linspace(-9, 40, 4001, dtype=np.float32)}


@pytest.mark.parametrize("zero_point", [1, 20, 51, 127, 128, 200, 255])
@pytest.mark.parametrize("level", ["none", "all"])
def test_a_product_gives_the_same_numbers(zero_point, level):
    model = parse(3 / zero_point, zero_point)
    changed = run_passes([IntegerHardSwish()], model)
    assert ops(changed).count("HardSwish") == 0
    assert ops(changed).count("Mul") == 1
    assert ops(changed).count("Clip") == (2 * zero_point < 255)
    runtime = Runtime(threads=1)
    before, after = (runtime.session(m, level).run(FEEDS)[0] for m in (model, changed))
    steps = np.abs(before - after) / 0.04
    assert steps.max() < 1.01  # ties may round either way
    assert np.mean(steps > 0.5) < 0.02


def test_it_is_hard_swish_of_the_values_themselves():
    changed = run_passes([IntegerHardSwish()], parse(3 / 50, 50))
    x = FEEDS["x"]
    exact = x * np.clip(x / 6 + 0.5, 0, 1)
    inside = (x < 12) & (exact < 9)
    error = np.abs(Runtime(threads=1).session(changed, "none").run(FEEDS)[0] - exact)[inside]
    assert error.max() < 0.06 * 1.5 / 2 + 0.04 / 2 + 1e-5  # half a step of each quantizer; the slope is at most 1.5


@pytest.mark.parametrize(
    "model",
    [
        parse(0.1, 50),
        parse(3 / 50, 50, np.int8),
        parse(0.1, 0),
        parse(3 / 50, 50, nodes="q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = HardSwish (d)"),
        parse(3 / 50, 50, nodes="h = HardSwish (x) r = QuantizeLinear (h, t, u) y = DequantizeLinear (r, t, u)"),
    ],
    ids=["another scale", "INT8", "no zero point", "float behind it", "float before it"],
)
def test_others_stay(model):
    assert ops(run_passes([IntegerHardSwish()], model)) == ops(model)
