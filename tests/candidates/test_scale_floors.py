"""Scale floors: they make every bias fit INT32; layers without a bias have none."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.candidates.scale_floors import scale_floors
from rdoq_onnx.config import Config

BIAS = np.array([1e9, -2e4, 0], np.float32)


def floors(nodes, **biases):
    """Return the scale floors of a network whose input x has the range -1..3."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[N, 3] y) {{ {nodes} }}""")
    weights = {"w": np.ones((4, 3), np.float32), "v": np.ones((3, 4, 1), np.float32)} | biases
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    network = analyse(model, Config().selection)
    return scale_floors(network, {a.tensor: (-1.0, 3.0) for a in network.activations})


@pytest.mark.parametrize("nodes", ["y = Gemm (x, w, b)", "[z] z = MatMul (x, w) [y] y = Add (z, b)"])
def test_biases_fit_beside_the_finest_quantizer(nodes):
    (found,) = floors(nodes, b=BIAS)
    finest = 4 / 2550  # a tenth of the range in 255 steps
    np.testing.assert_allclose(np.abs(BIAS), found * finest * 2.0**29)


def test_one_bias_for_all_channels():
    (found,) = floors("[z] z = MatMul (x, w) [y] y = Add (z, b)", b=np.array([-5.0], np.float32))
    assert found.shape == (3,)
    assert len(set(found.tolist())) == 1
    assert found[0] > 0


@pytest.mark.parametrize("nodes", ["y = MatMul (x, w)", "y = Gemm (x, w)", "[z] z = MatMul (x, w) [y] y = Mul (z, b)"])
def test_no_bias_no_floor(nodes):
    assert floors(nodes, b=BIAS) == [None]
