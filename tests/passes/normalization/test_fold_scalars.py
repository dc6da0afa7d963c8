"""Numbers behind a HardSwish fold into the layer behind them, exactly, and no others do."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization.fold_scalars import FoldScalars
from tests.conftest import deviation

PADDED = "y = Conv <pads = [1, 1, 1, 1]> (t, w)"


def parse(nodes):
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 4, 8, 8] x) => (float[N, M, H, W] y) {{ {nodes} }}'
    )
    rng = np.random.default_rng(0)
    values = {"w": rng.standard_normal((6, 4, 3, 3)), "v": rng.standard_normal(6), "c": rng.standard_normal((4, 1, 1))}
    values |= {"a": 1.7, "b": [-0.3], "o": 0.0}
    used = {i for node in model.graph.node for i in node.input}
    arrays = {n: np.asarray(v, np.float32) for n, v in values.items() if n in used}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in arrays.items())
    return model


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("h = HardSwish (x) s = Mul (a, h) t = Add (s, b) y = Conv (t, w, v)", ["HardSwish", "Conv"]),
        ("h = HardSwish (x) t = Add (b, h) y = Conv (t, w)", ["HardSwish", "Conv"]),
        (f"h = HardSwish (x) t = Mul (h, a) {PADDED}", ["HardSwish", "Conv"]),
        (f"h = HardSwish (x) s = Mul (h, a) t = Add (s, b) {PADDED}", ["HardSwish", "Add", "Conv"]),
        (f"h = HardSwish (x) t = Add (h, b) {PADDED}", ["HardSwish", "Add", "Conv"]),
        (f"h = HardSwish (x) s = Mul (h, o) t = Add (s, b) {PADDED}", ["HardSwish", "Mul", "Add", "Conv"]),
        ("h = HardSwish (x) t = Mul (h, c) y = Conv (t, w)", ["HardSwish", "Mul", "Conv"]),
        ("h = Relu (x) s = Mul (h, a) t = Add (s, b) y = Conv (t, w)", ["Relu", "Mul", "Add", "Conv"]),
        ("h = HardSwish (x) t = Mul (h, a) z = Conv (t, w) y = Add (z, t)", ["HardSwish", "Mul", "Conv", "Add"]),
    ],
)
def test_numbers_fold_where_they_can(nodes, expected, ort_run):
    shape = (1, 4, 8, 8)
    if "y = Add (z, t)" in nodes:
        nodes = nodes.replace("z = Conv (t, w)", "z = Conv <pads = [1, 1, 1, 1]> (t, w4)").replace("w4", "q")
    model = parse(nodes)
    if any("q" in n.input for n in model.graph.node):
        weight = np.random.default_rng(2).standard_normal((4, 4, 3, 3)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, "q"))
    folded = run_passes([FoldScalars()], model)
    assert [n.op_type for n in folded.graph.node] == expected
    feeds = {"x": 3 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    assert deviation(ort_run(folded, feeds), ort_run(model, feeds)) < 1e-5
